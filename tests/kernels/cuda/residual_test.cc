#include "kernels/cuda/residual/residual.h"

#include "kernels/reference/dense.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/row_rule.h"

namespace moebius::kernels::cuda {
namespace {

std::vector<Bf16> Compute(const RowPool& h_pool, const RowPool& y_pool, const RowPool* shared_pool,
                          int64_t m, int64_t shift) {
  const DeviceBuffer<Bf16> h(h_pool.Batch(m, shift)), y(y_pool.Batch(m, shift));
  const DeviceBuffer<Bf16> shared((shared_pool != nullptr ? *shared_pool : y_pool).Batch(m, shift));
  ResidualParams params;
  params.m = m;
  params.dim = h_pool.dim();
  params.h = h.get();
  params.y = y.get();
  params.shared = shared_pool != nullptr ? shared.get() : nullptr;
  const absl::Status status = LaunchResidual(params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "Residual");
  return h.Download();
}

class ResidualTest : public GpuTest {};

TEST_F(ResidualTest, BitsAreThoseOfTheReference) {
  struct Case {
    int64_t m, dim;
  };
  for (const Case c : {Case{1, 7168}, Case{16, 1}, Case{33, 77}, Case{130, 1040}, Case{3, 1027}}) {
    const RowPool h(c.dim, 1), y(c.dim, 2), shared(c.dim, 3);
    for (const bool moe : {false, true}) {
      const std::vector<Bf16> found = Compute(h, y, moe ? &shared : nullptr, c.m, 0);
      for (int64_t i = 0; i < c.m; ++i) {
        std::vector<float> sum = y.Floats(RowPool::Row(i, 0)),
                           expected = h.Floats(RowPool::Row(i, 0));
        if (moe) {
          reference::ResidualAddRow(shared.Floats(RowPool::Row(i, 0)),
                                    reference::Rounding::kServing, absl::MakeSpan(sum));
        }
        reference::ResidualAddRow(sum, reference::Rounding::kServing, absl::MakeSpan(expected));
        for (int64_t d = 0; d < c.dim; ++d) {
          ASSERT_EQ(UlpDistance(found[static_cast<size_t>(i * c.dim + d)],
                                ToBf16(expected[static_cast<size_t>(d)])),
                    0)
              << c.m << " x " << c.dim << ": row " << i << ", element " << d;
        }
      }
    }
  }
}

TEST_F(ResidualTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  for (const int64_t dim : {1040, 777}) {
    const RowPool h(dim, 4), y(dim, 5), shared(dim, 6);
    ExpectRowRule("Residual", dim, [&](int64_t m, int64_t shift) {
      RowHashes hashes(m);
      hashes.Add(Compute(h, y, &shared, m, shift), dim, dim);
      return hashes.hashes();
    });
  }
}

TEST_F(ResidualTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  ResidualParams params;
  EXPECT_TRUE(LaunchResidual(params, nullptr).ok()) << "no rows";
  const auto refusal = [&] { return std::string(LaunchResidual(params, nullptr).message()); };
  const DeviceBuffer<Bf16> rows(64);
  params.m = 1;
  EXPECT_NE(refusal().find("dim is 0"), std::string::npos);
  params.dim = 32;
  EXPECT_NE(refusal().find("h is null"), std::string::npos);
  params.h = rows.get();
  EXPECT_NE(refusal().find("y is null"), std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
