#include "kernels/cuda/quantize_rows/quantize_rows.h"

#include <cstdio>

#include "kernels/reference/experts.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/quantizer_pairs.h"
#include "tests/kernels/cuda/row_rule.h"

namespace moebius::kernels::cuda {
namespace {

struct Quantized {
  std::vector<E4m3> codes;
  std::vector<float> scales;
};

Quantized Quantize(const std::vector<Bf16>& rows, int64_t m, int64_t dim, int64_t stride,
                   bool power_of_two, const std::vector<int32_t>& index = {}) {
  const DeviceBuffer<Bf16> x(rows);
  const DeviceBuffer<int32_t> row_index(index);
  const DeviceBuffer<E4m3> codes(static_cast<size_t>(m * dim));
  const DeviceBuffer<float> scales(static_cast<size_t>(m * CeilDiv(dim, 128)));
  QuantizeRowsParams params;
  params.m = m;
  params.dim = dim;
  params.x = x.get();
  params.x_stride = stride;
  params.row_index = index.empty() ? nullptr : row_index.get();
  params.codes = codes.get();
  params.scales = scales.get();
  params.power_of_two_scales = power_of_two;
  const absl::Status status = LaunchQuantizeRows(params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "QuantizeRows");
  return {codes.Download(), scales.Download()};
}

// What kernels/reference makes of each row of a pool.
struct Expected {
  Expected(const RowPool& pool, bool power_of_two) {
    for (int64_t row = 0; row < RowPool::kRows; ++row) {
      Quantized q{std::vector<E4m3>(static_cast<size_t>(pool.dim())),
                  std::vector<float>(static_cast<size_t>(CeilDiv(pool.dim(), 128)))};
      reference::QuantizeRow(pool.Floats(row), power_of_two, absl::MakeSpan(q.codes),
                             absl::MakeSpan(q.scales));
      RowHashes hash(1);
      hash.Add(q.codes, pool.dim(), pool.dim());
      hash.Add(q.scales, CeilDiv(pool.dim(), 128), CeilDiv(pool.dim(), 128));
      hashes.push_back(hash.hashes()[0]);
    }
  }
  std::vector<uint64_t> hashes;
};

std::vector<uint64_t> Hashes(const Quantized& q, int64_t m, int64_t dim) {
  RowHashes hashes(m);
  hashes.Add(q.codes, dim, dim);
  hashes.Add(q.scales, CeilDiv(dim, 128), CeilDiv(dim, 128));
  return hashes.hashes();
}

class QuantizeRowsTest : public GpuTest {};

TEST_F(QuantizeRowsTest, BitsAreThoseOfTheReference) {
  struct Case {
    int64_t m, dim, padding;
  };
  for (const bool power_of_two : {false, true}) {
    for (const Case c :
         {Case{1, 7168, 0}, Case{16, 1, 0}, Case{33, 128, 0}, Case{40, 200, 56}, Case{129, 144, 0},
          Case{64, 1031, 1}, Case{3000, 1040, 0}, Case{333, 7168, 0}, Case{16, 20000, 0}}) {
      const RowPool pool(c.dim, 1);
      const Expected expected(pool, power_of_two);
      const auto hashes = Hashes(Quantize(pool.Batch(c.m, 3, c.dim + c.padding), c.m, c.dim,
                                          c.dim + c.padding, power_of_two),
                                 c.m, c.dim);
      for (int64_t i = 0; i < c.m; ++i) {
        ASSERT_EQ(hashes[static_cast<size_t>(i)],
                  expected.hashes[static_cast<size_t>(RowPool::Row(i, 3))])
            << c.m << " x " << c.dim << ", row " << i << " (kind " << RowPool::Row(i, 3) << ")";
      }
    }
  }
}

TEST_F(QuantizeRowsTest, TheFastDivisionIsIeeeDivisionForEveryPair) {
  for (const bool power_of_two : {false, true}) {
    const DeviceBuffer<unsigned long long> counts(std::vector<unsigned long long>{0, 0});
    ASSERT_CUDA_OK(LaunchQuantizerPairs(power_of_two, counts.get(), counts.get() + 1, nullptr));
    const std::vector<unsigned long long> found = counts.Download();
    std::printf("%llu of %llu codes differ\n", found[0], found[1]);
    EXPECT_EQ(found[0], 0u);
    EXPECT_EQ(found[1], 0x7f80ull * 0x7f81ull);
  }
}

TEST_F(QuantizeRowsTest, RowsAreGatheredByIndex) {
  const int64_t m = 50, dim = 272;
  const RowPool pool(dim, 2);
  std::vector<int32_t> index;
  Prng random(3);
  for (int64_t i = 0; i < m; ++i) index.push_back(static_cast<int32_t>(random.Below(16)));
  const auto hashes = Hashes(Quantize(pool.Batch(16, 0), m, dim, dim, false, index), m, dim);
  const Expected expected(pool, false);
  for (int64_t i = 0; i < m; ++i) {
    ASSERT_EQ(hashes[static_cast<size_t>(i)],
              expected.hashes[static_cast<size_t>(RowPool::Row(index[static_cast<size_t>(i)], 0))]);
  }
}

TEST_F(QuantizeRowsTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  for (const int64_t dim : {1040, 777}) {
    const RowPool pool(dim, 4);
    ExpectRowRule("QuantizeRows", dim, [&](int64_t m, int64_t shift) {
      return Hashes(Quantize(pool.Batch(m, shift), m, dim, dim, false), m, dim);
    });
  }
}

TEST_F(QuantizeRowsTest, DispatchPutsEveryRowInEachOfItsPlacesAndNowhereElse) {
  for (const int64_t dim : {7168, 1040, 1032, 333}) {
    const int64_t m = 131, blocks = CeilDiv(dim, 128);
    const int num_targets = 19;
    const RowPool pool(dim, 5);
    const Expected expected(pool, true);
    const DeviceBuffer<Bf16> x(pool.Batch(m, 0));
    // Frames with a header between rows, so that every other row of codes is aligned to 8 bytes
    // only; one frame is not aligned to 8 bytes.
    const int64_t code_stride = dim + 24, scale_stride = blocks + 3;
    std::vector<std::unique_ptr<DeviceBuffer<E4m3>>> codes;
    std::vector<std::unique_ptr<DeviceBuffer<float>>> scales;
    std::vector<std::vector<int64_t>> sources(num_targets);
    std::vector<int32_t> copy_begin = {0};
    std::vector<std::pair<int, int64_t>> places;  // target and row there
    Prng random(6);
    for (int64_t row = 0; row < m; ++row) {
      const uint64_t chance = random.Below(4);  // some rows go nowhere, some everywhere
      for (int t = 0; t < num_targets; ++t) {
        if (random.Below(4) >= chance) continue;
        auto& rows = sources[static_cast<size_t>(t)];
        places.push_back({t, static_cast<int64_t>(rows.size())});
        rows.push_back(row);
      }
      copy_begin.push_back(static_cast<int32_t>(places.size()));
    }
    for (int t = 0; t < num_targets; ++t) {
      const auto rows = sources[static_cast<size_t>(t)].size();
      codes.push_back(
          std::make_unique<DeviceBuffer<E4m3>>(rows * static_cast<size_t>(code_stride) + 4));
      scales.push_back(
          std::make_unique<DeviceBuffer<float>>(rows * static_cast<size_t>(scale_stride)));
    }
    std::vector<RowCopy> copies;
    for (const auto& [t, row] : places) {
      copies.push_back({codes[static_cast<size_t>(t)]->get() + (t == 4 ? 4 : 0) + row * code_stride,
                        scales[static_cast<size_t>(t)]->get() + row * scale_stride});
    }
    const DeviceBuffer<int32_t> device_begin(copy_begin);
    const DeviceBuffer<RowCopy> device_copies(copies);
    DispatchRowsParams params;
    params.m = m;
    params.dim = params.x_stride = dim;
    params.x = x.get();
    params.copy_begin = device_begin.get();
    params.copies = device_copies.get();
    params.power_of_two_scales = true;
    ASSERT_STATUS_OK(LaunchDispatchRows(params, nullptr));
    ASSERT_CUDA_OK(cudaStreamSynchronize(nullptr));
    size_t compared = 0;
    for (int t = 0; t < num_targets; ++t) {
      std::vector<E4m3> code = codes[static_cast<size_t>(t)]->Download();
      const std::vector<float> scale = scales[static_cast<size_t>(t)]->Download();
      if (t == 4) code.erase(code.begin(), code.begin() + 4);
      const auto& rows = sources[static_cast<size_t>(t)];
      RowHashes hashes(static_cast<int64_t>(rows.size()));
      hashes.Add(code, dim, code_stride);
      hashes.Add(scale, blocks, scale_stride);
      for (size_t i = 0; i < rows.size(); ++i, ++compared) {
        ASSERT_EQ(hashes.hashes()[i],
                  expected.hashes[static_cast<size_t>(RowPool::Row(rows[i], 0))])
            << "target " << t << ", row " << i;
        for (int64_t b = dim; b < code_stride; ++b) {
          ASSERT_EQ(code[i * static_cast<size_t>(code_stride) + static_cast<size_t>(b)].bits, 0xcd);
        }
      }
    }
    EXPECT_EQ(compared, places.size());
  }
}

TEST_F(QuantizeRowsTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  QuantizeRowsParams params;
  EXPECT_TRUE(LaunchQuantizeRows(params, nullptr).ok()) << "no rows";
  const auto refusal = [&] { return std::string(LaunchQuantizeRows(params, nullptr).message()); };
  const DeviceBuffer<Bf16> rows(64);
  params.m = 1;
  EXPECT_NE(refusal().find("dim is 0"), std::string::npos);
  params.dim = 64;
  EXPECT_NE(refusal().find("x_stride is 0"), std::string::npos);
  params.x_stride = 64;
  EXPECT_NE(refusal().find("x is null"), std::string::npos);
  params.x = rows.get();
  EXPECT_NE(refusal().find("codes is null"), std::string::npos);
  params.codes = reinterpret_cast<E4m3*>(rows.get());
  EXPECT_NE(refusal().find("scales is null"), std::string::npos);
  DispatchRowsParams dispatch;
  EXPECT_TRUE(LaunchDispatchRows(dispatch, nullptr).ok()) << "no rows";
  dispatch.m = 1;
  dispatch.dim = dispatch.x_stride = 64;
  dispatch.x = rows.get();
  EXPECT_NE(std::string(LaunchDispatchRows(dispatch, nullptr).message()).find("copy_begin is null"),
            std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
