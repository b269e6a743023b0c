#include "kernels/cuda/swiglu/swiglu.h"

#include <bit>
#include <cmath>

#include "kernels/reference/dense.h"
#include "kernels/reference/experts.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/row_rule.h"

namespace moebius::kernels::cuda {
namespace {

struct Result {
  std::vector<Bf16> out;
  std::vector<E4m3> codes;
  std::vector<float> scales;
};

// gate and up are the halves of one matrix, gate first.
Result Compute(const std::vector<Bf16>& gate_up, int64_t m, int64_t dim, bool power_of_two) {
  const DeviceBuffer<Bf16> in(gate_up);
  const DeviceBuffer<Bf16> out(static_cast<size_t>(m * dim));
  const DeviceBuffer<E4m3> codes(static_cast<size_t>(m * dim));
  const DeviceBuffer<float> scales(static_cast<size_t>(m * CeilDiv(dim, 128)));
  SwiGluParams params;
  params.m = m;
  params.dim = dim;
  params.gate = in.get();
  params.up = in.get() + dim;
  params.in_stride = 2 * dim;
  params.out = out.get();
  params.codes = codes.get();
  params.scales = scales.get();
  params.power_of_two_scales = power_of_two;
  const absl::Status status = LaunchSwiGlu(params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "SwiGlu");
  return {out.Download(), codes.Download(), scales.Download()};
}

class SwiGluTest : public GpuTest {};

TEST_F(SwiGluTest, AgreesWithTheReferenceAtOddShapes) {
  UlpReport report;
  struct Case {
    int64_t m, dim;
  };
  for (const bool power_of_two : {false, true}) {
    for (const Case c : {Case{128, 2048}, Case{3, 18432}, Case{50, 272}, Case{16, 1}, Case{33, 129},
                         Case{2000, 144}}) {
      const RowPool pool(2 * c.dim, 1);
      const Result found = Compute(pool.Batch(c.m, 0), c.m, c.dim, power_of_two);
      const int64_t blocks = CeilDiv(c.dim, 128);
      for (int64_t i = 0; i < c.m; ++i) {
        const std::vector<float> both = pool.Floats(RowPool::Row(i, 0));
        std::vector<float> gate(both.begin(), both.begin() + c.dim);
        reference::SwiGluRow(gate, absl::MakeConstSpan(both.data() + c.dim, c.dim),
                             reference::Rounding::kServing, absl::MakeSpan(gate));
        std::vector<float> out;
        for (int64_t d = 0; d < c.dim; ++d) {
          const Bf16 value = found.out[static_cast<size_t>(i * c.dim + d)];
          report.Add(value, ToBf16(gate[static_cast<size_t>(d)]));
          out.push_back(ToFloat(value));
        }
        std::vector<E4m3> codes(static_cast<size_t>(c.dim));
        std::vector<float> scales(static_cast<size_t>(blocks));
        reference::QuantizeRow(out, power_of_two, absl::MakeSpan(codes), absl::MakeSpan(scales));
        for (int64_t d = 0; d < c.dim; ++d) {
          ASSERT_EQ(found.codes[static_cast<size_t>(i * c.dim + d)].bits,
                    codes[static_cast<size_t>(d)].bits)
              << c.m << " x " << c.dim << ": row " << i << ", element " << d;
        }
        for (int64_t b = 0; b < blocks; ++b) {
          ASSERT_EQ(std::bit_cast<uint32_t>(found.scales[static_cast<size_t>(i * blocks + b)]),
                    std::bit_cast<uint32_t>(scales[static_cast<size_t>(b)]));
        }
      }
    }
  }
  report.Print("SwiGLU against the reference");
  EXPECT_LE(report.worst, 1);
}

TEST_F(SwiGluTest, EveryGateValueIsWithinOneUnitOfTheFormula) {
  // All 65,536 BF16 gates against up = 1 and up = -3.
  UlpReport report;
  for (const float up : {1.0f, -3.0f}) {
    std::vector<Bf16> rows;
    for (int row = 0; row < 256; ++row) {
      for (int i = 0; i < 256; ++i) rows.push_back(Bf16{static_cast<uint16_t>(row * 256 + i)});
      rows.insert(rows.end(), 256, ToBf16(up));
    }
    const Result found = Compute(rows, 256, 256, false);
    for (int bits = 0; bits < 65536; ++bits) {
      const double z = ToFloat(Bf16{static_cast<uint16_t>(bits)});
      const double silu = z == -INFINITY ? NAN : z / (1.0 + std::exp(-z));
      // Gates below -88 overflow exp in float32 and give 0 where the formula gives less than 1e-36.
      if (z < -87.0 && z > -1e30) continue;
      report.Add(found.out[static_cast<size_t>(bits)],
                 ToBf16(static_cast<float>(static_cast<float>(silu) * up)));
    }
  }
  report.Print("SwiGLU of every gate against double precision");
  EXPECT_LE(report.worst, 1);
}

TEST_F(SwiGluTest, OutMayLieWhereGateOrUpDidAndEitherOutputMayBeLeftOut) {
  const int64_t m = 17, dim = 272;
  const RowPool gate_pool(dim, 2), up_pool(dim, 3);
  const DeviceBuffer<Bf16> gate(gate_pool.Batch(m, 0)), up(up_pool.Batch(m, 0)),
      out(static_cast<size_t>(m * dim));
  const DeviceBuffer<E4m3> codes(static_cast<size_t>(m * dim)), alone(static_cast<size_t>(m * dim));
  const DeviceBuffer<float> scales(static_cast<size_t>(m * 3));
  SwiGluParams params;
  params.m = m;
  params.dim = params.in_stride = dim;
  params.gate = gate.get();
  params.up = up.get();
  params.out = out.get();
  params.codes = codes.get();
  params.scales = scales.get();
  ASSERT_STATUS_OK(LaunchSwiGlu(params, nullptr));
  params.out = nullptr;
  params.codes = alone.get();
  ASSERT_STATUS_OK(LaunchSwiGlu(params, nullptr));
  params.codes = nullptr;
  params.out = gate.get();
  ASSERT_STATUS_OK(LaunchSwiGlu(params, nullptr));
  EXPECT_EQ(HashOf(gate.Download()), HashOf(out.Download()));
  EXPECT_EQ(HashOf(alone.Download()), HashOf(codes.Download()));
}

TEST_F(SwiGluTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  for (const int64_t dim : {528, 389}) {
    const RowPool pool(2 * dim, 4);
    ExpectRowRule("SwiGLU", 2 * dim, [&](int64_t m, int64_t shift) {
      const Result result = Compute(pool.Batch(m, shift), m, dim, false);
      RowHashes hashes(m);
      hashes.Add(result.out, dim, dim);
      hashes.Add(result.codes, dim, dim);
      hashes.Add(result.scales, CeilDiv(dim, 128), CeilDiv(dim, 128));
      return hashes.hashes();
    });
  }
}

TEST_F(SwiGluTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  SwiGluParams params;
  EXPECT_TRUE(LaunchSwiGlu(params, nullptr).ok()) << "no rows";
  const auto refusal = [&] { return std::string(LaunchSwiGlu(params, nullptr).message()); };
  const DeviceBuffer<Bf16> rows(64);
  params.m = 1;
  EXPECT_NE(refusal().find("dim is 0"), std::string::npos);
  params.dim = 32;
  EXPECT_NE(refusal().find("in_stride is 0"), std::string::npos);
  params.in_stride = 32;
  EXPECT_NE(refusal().find("gate is null"), std::string::npos);
  params.gate = rows.get();
  EXPECT_NE(refusal().find("up is null"), std::string::npos);
  params.up = rows.get();
  EXPECT_NE(refusal().find("neither out nor codes"), std::string::npos);
  params.codes = reinterpret_cast<E4m3*>(rows.get());
  EXPECT_NE(refusal().find("scales is null"), std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
