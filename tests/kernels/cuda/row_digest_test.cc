#include "kernels/cuda/row_digest/row_digest.h"

#include <bit>

#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/row_rule.h"

namespace moebius::kernels::cuda {
namespace {

std::vector<uint64_t> Digests(const std::vector<Bf16>& rows, int64_t m, int64_t dim, int64_t stride,
                              const std::vector<float>& logprobs, int64_t offset = 0) {
  // `offset` elements before the first row: other alignments.
  std::vector<Bf16> moved(static_cast<size_t>(offset));
  moved.insert(moved.end(), rows.begin(), rows.end());
  const DeviceBuffer<Bf16> hidden(moved);
  const DeviceBuffer<float> device_logprobs(logprobs);
  const DeviceBuffer<uint64_t> digests(static_cast<size_t>(m));
  RowDigestParams params;
  params.m = m;
  params.dim = dim;
  params.hidden = hidden.get() + offset;
  params.hidden_stride = stride;
  params.logprobs = device_logprobs.get();
  params.digests = digests.get();
  const absl::Status status = LaunchRowDigest(params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "RowDigest");
  return digests.Download();
}

// As kernels/reference and kernels/cpu define it.
uint64_t Expected(const Bf16* row, int64_t dim, float logprob) {
  return Hash64(row, static_cast<size_t>(dim) * sizeof(Bf16), std::bit_cast<uint32_t>(logprob));
}

// Three rows of each length, at odd alignments and strides.
void ExpectTheHashOfTheHost(const std::vector<int64_t>& dims) {
  int64_t compared = 0;
  Prng random(1);
  for (const int64_t dim : dims) {
    const int64_t m = 3, stride = dim + dim % 3, offset = dim % 5;
    std::vector<Bf16> rows(static_cast<size_t>(m * stride));
    for (Bf16& value : rows) value.bits = static_cast<uint16_t>(random.Next());
    const std::vector<float> logprobs = {-NormalDraw(random), 0.0f, -1e-3f};
    const std::vector<uint64_t> digests = Digests(rows, m, dim, stride, logprobs, offset);
    for (int64_t i = 0; i < m; ++i, ++compared) {
      ASSERT_EQ(digests[static_cast<size_t>(i)],
                Expected(rows.data() + i * stride, dim, logprobs[static_cast<size_t>(i)]))
          << "dim " << dim << ", row " << i;
    }
  }
  std::printf("%ld digests equal\n", static_cast<long>(compared));
}

class RowDigestTest : public GpuTest {};

// The hash has ways of its own for rows of 1, up to 4, 8, 64 and 120 values, and goes by the
// kilobyte above. Rows of 540, 1104 and 7164 are read 8 bytes at a time.
TEST_F(RowDigestTest, EqualsTheHashOfTheHostAtTheBordersOfItsCases) {
  ExpectTheHashOfTheHost({1,   2,   4,    5,    8,    9,    64,   65,   120,   121,  512,
                          513, 540, 1023, 1024, 1025, 1104, 7164, 7169, 32767, 32768});
}

TEST_F(RowDigestTest, EqualsTheHashOfTheHostForRowsOfEveryLength) {
  std::vector<int64_t> dims;
  for (int64_t dim = 1; dim <= 1100; ++dim) dims.push_back(dim);
  for (const int64_t dim : {1535, 1536, 1537, 2048, 4096, 5120, 7168, 7169, 8191, 8192, 16385})
    dims.push_back(dim);
  ExpectTheHashOfTheHost(dims);
}

TEST_F(RowDigestTest, EveryBitOfTheRowAndOfTheLogprobCounts) {
  const int64_t dim = 7168;
  Prng random(2);
  std::vector<Bf16> rows;
  const std::vector<Bf16> row = RandomBf16(random, static_cast<size_t>(dim));
  std::vector<float> logprobs(130, -1.25f);
  for (int i = 0; i < 130; ++i) rows.insert(rows.end(), row.begin(), row.end());
  for (int i = 1; i < 129; ++i)
    rows[static_cast<size_t>(i * dim + i * 55 + 3)].bits ^= 1 << (i % 16);
  logprobs[129] = std::bit_cast<float>(std::bit_cast<uint32_t>(-1.25f) ^ 1u);
  const std::vector<uint64_t> digests = Digests(rows, 130, dim, dim, logprobs);
  for (size_t i = 1; i < digests.size(); ++i) EXPECT_NE(digests[i], digests[0]) << i;
}

TEST_F(RowDigestTest, ARowsDigestHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  for (const int64_t dim : {1040, 64}) {
    const RowPool pool(dim, 3);
    ExpectRowRule("RowDigest", dim, [&](int64_t m, int64_t shift) {
      std::vector<float> logprobs;
      for (int64_t i = 0; i < m; ++i)
        logprobs.push_back(-0.5f * static_cast<float>(RowPool::Row(i, shift)));
      return Digests(pool.Batch(m, shift), m, dim, dim, logprobs);
    });
  }
}

TEST_F(RowDigestTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  RowDigestParams params;
  EXPECT_TRUE(LaunchRowDigest(params, nullptr).ok()) << "no rows";
  const auto refusal = [&] { return std::string(LaunchRowDigest(params, nullptr).message()); };
  const DeviceBuffer<Bf16> rows(64);
  params.m = 1;
  params.dim = 32769;
  EXPECT_NE(refusal().find("dim is 32769"), std::string::npos);
  params.dim = 64;
  EXPECT_NE(refusal().find("hidden_stride is 0"), std::string::npos);
  params.hidden_stride = 64;
  EXPECT_NE(refusal().find("hidden is null"), std::string::npos);
  params.hidden = rows.get();
  EXPECT_NE(refusal().find("logprobs is null"), std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
