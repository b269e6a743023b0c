#include "kernels/cuda/fp8_linear/fp8_linear.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <utility>

#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

int64_t Blocks(int64_t size) { return (size + 127) / 128; }

// A weight matrix on both sides.
struct Weight {
  Weight(int64_t rows, int64_t cols, uint64_t seed) : n(rows), k(cols) {
    Prng random(seed);
    codes = RandomE4m3(random, static_cast<size_t>(n * k), 30.0f);
    scales = RandomFloats(random, static_cast<size_t>(Blocks(n) * Blocks(k)), 1e-3f);
    device_codes = std::make_unique<DeviceBuffer<E4m3>>(codes);
    device_scales = std::make_unique<DeviceBuffer<float>>(scales);
  }
  int64_t n, k;
  std::vector<E4m3> codes;
  std::vector<float> scales;
  std::unique_ptr<DeviceBuffer<E4m3>> device_codes;
  std::unique_ptr<DeviceBuffer<float>> device_scales;
};

struct Rows {
  std::vector<E4m3> codes;    // [m, k]
  std::vector<float> scales;  // [m, blocks]
};

Rows RandomRows(int64_t m, int64_t k, uint64_t seed) {
  Prng random(seed);
  return {RandomE4m3(random, static_cast<size_t>(m * k), 60.0f),
          RandomFloats(random, static_cast<size_t>(m * Blocks(k)), 1e-2f)};
}

std::vector<Bf16> Multiply(const Weight& weight, const Rows& rows, int64_t m) {
  const DeviceBuffer<E4m3> x(rows.codes);
  const DeviceBuffer<float> x_scales(rows.scales);
  const DeviceBuffer<Bf16> out(static_cast<size_t>(m * weight.n));
  Fp8LinearParams params;
  params.m = m;
  params.n = weight.n;
  params.k = weight.k;
  params.x = x.get();
  params.x_scales = x_scales.get();
  params.weight = weight.device_codes->get();
  params.weight_scales = weight.device_scales->get();
  params.out = out.get();
  params.out_stride = weight.n;
  const absl::Status status = LaunchFp8Linear(params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaDeviceSynchronize(), "Fp8Linear");
  return out.Download();
}

// kernels/reference's formula for one element (LinearRow with quantised inputs), in double.
double Element(const Weight& w, const Rows& rows, int64_t row, int64_t column) {
  double sum = 0;
  for (int64_t block = 0; block < Blocks(w.k); ++block) {
    double part = 0;
    for (int64_t i = block * 128; i < std::min(w.k, block * 128 + 128); ++i) {
      part += static_cast<double>(ToFloat(rows.codes[static_cast<size_t>(row * w.k + i)])) *
              ToFloat(w.codes[static_cast<size_t>(column * w.k + i)]);
    }
    sum += part * rows.scales[static_cast<size_t>(row * Blocks(w.k) + block)] *
           w.scales[static_cast<size_t>(column / 128 * Blocks(w.k) + block)];
  }
  return sum;
}

class Fp8LinearTest : public GpuTest {};

TEST_F(Fp8LinearTest, AgreesWithTheReferenceAtOddShapes) {
  struct Case {
    int64_t m, n, k;
  };
  for (const Case c : {Case{1, 64, 128}, Case{3, 200, 144}, Case{9, 129, 1536},
                       Case{17, 2112, 7168}, Case{33, 65, 400}, Case{64, 384, 256}, Case{65, 1, 16},
                       Case{130, 576, 2048}, Case{300, 1000, 1040}, Case{130, 4096, 2064}}) {
    const Weight weight(c.n, c.k, 1);
    const Rows rows = RandomRows(c.m, c.k, 2);
    const std::vector<Bf16> out = Multiply(weight, rows, c.m);
    std::vector<float> found, expected;
    Prng pick(3);
    for (int i = 0; i < 4000; ++i) {
      const int64_t row =
          i < c.m ? i : static_cast<int64_t>(pick.Below(static_cast<uint64_t>(c.m)));
      const int64_t column = static_cast<int64_t>(pick.Below(static_cast<uint64_t>(c.n)));
      found.push_back(ToFloat(out[static_cast<size_t>(row * c.n + column)]));
      expected.push_back(static_cast<float>(Element(weight, rows, row, column)));
    }
    const double difference = RelativeDifference(found, expected);
    std::printf("%4ld x %5ld x %5ld: difference %.2g\n", c.m, c.n, c.k, difference);
    EXPECT_LT(difference, 1e-3) << c.m << " x " << c.n << " x " << c.k;
  }
}

TEST_F(Fp8LinearTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  // One with K in four segments, one with it whole; the second tile rows of a 128-block are ragged.
  for (const auto& [n, shape_k] : {std::pair<int64_t, int64_t>{1088, 2048}, {1088, 1920}}) {
    const Weight weight(n, shape_k, 4);
    const int64_t k = weight.k;
    const Rows mine = RandomRows(1, k, 5);
    const std::vector<Bf16> alone = Multiply(weight, mine, 1);
    const CompetingKernel competing;
    int64_t compared = 0;
    for (const int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 512, 4096}) {
      Rows rows = RandomRows(m, k, 6 + static_cast<uint64_t>(m));
      // Neighbours of every kind: NaN codes, the largest codes, scales of infinity and NaN.
      for (int64_t row = 0; row < m; ++row) {
        const auto at = static_cast<size_t>(row);
        if (row % 5 == 1) rows.codes[at * static_cast<size_t>(k) + 7] = E4m3{0x7f};
        if (row % 5 == 2) rows.scales[at * static_cast<size_t>(Blocks(k))] = INFINITY;
        if (row % 5 == 3) rows.scales[at * static_cast<size_t>(Blocks(k))] = NAN;
      }
      // The row stands at every place where m is small, else at every third.
      for (int64_t place = 0; place<m; place += m> 64 ? 3 : 1) {
        if (m > 64 && place >= 3 * 64) break;
        // All places congruent to `place` at once in large batches: more rows compared per launch.
        Rows now = rows;
        std::vector<int64_t> places;
        for (int64_t p = place; p < m; p += 193) places.push_back(p);
        for (const int64_t p : places) {
          std::copy(mine.codes.begin(), mine.codes.end(), now.codes.begin() + p * k);
          std::copy(mine.scales.begin(), mine.scales.end(), now.scales.begin() + p * Blocks(k));
        }
        const std::vector<Bf16> out = Multiply(weight, now, m);
        for (const int64_t p : places) {
          const std::vector<Bf16> row(out.begin() + p * weight.n, out.begin() + (p + 1) * weight.n);
          ASSERT_EQ(HashOf(row), HashOf(alone)) << "m = " << m << ", place " << p;
          compared += weight.n;
        }
      }
    }
    std::printf("K in %d segments: %ld values compared\n", Fp8LinearSegments(n, k), compared);
    EXPECT_EQ(Fp8LinearSegments(n, k), n == 1088 && k == 2048 ? 4 : 1);
  }
}

TEST_F(Fp8LinearTest, LaunchesBesideACompetingKernelAgree) {
  const Weight weight(4096, 1536, 8);
  const Rows rows = RandomRows(64, weight.k, 9);
  const DeviceBuffer<E4m3> x(rows.codes);
  const DeviceBuffer<float> x_scales(rows.scales);
  DeviceBuffer<Bf16> out(static_cast<size_t>(64 * weight.n));
  Fp8LinearParams params;
  params.n = params.out_stride = weight.n;
  params.k = weight.k;
  params.x = x.get();
  params.x_scales = x_scales.get();
  params.weight = weight.device_codes->get();
  params.weight_scales = weight.device_scales->get();
  params.out = out.get();
  const CompetingKernel competing;
  for (const int64_t m : {3, 64}) {
    params.m = m;
    uint64_t first = 0;
    for (int launch = 0; launch < 10'000; ++launch) {
      ASSERT_STATUS_OK(LaunchFp8Linear(params, nullptr));
      if (launch % 100 != 0) continue;  // every hundredth is read back, after 99 that overwrote it
      const uint64_t hash = HashOf(out.Download());
      if (launch == 0) first = hash;
      ASSERT_EQ(hash, first) << "launch " << launch;
      out.Poison();
    }
  }
}

TEST_F(Fp8LinearTest, ShapesThatItCannotTakeAreRefusedByName) {
  Fp8LinearParams params;
  EXPECT_TRUE(LaunchFp8Linear(params, nullptr).ok()) << "no rows";
  params.m = 1;
  params.n = 64;
  params.k = 120;
  const absl::Status status = LaunchFp8Linear(params, nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("k is 120"), absl::string_view::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
