// Goal: row quantisation, FP8 products and the canonical sum, on values that are exact.

#include "kernels/reference/experts.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/reference/dense.h"

namespace moebius::kernels::reference {
namespace {

struct Quantized {
  std::vector<E4m3> codes;
  std::vector<float> scales;
  float Value(size_t i) const { return ToFloat(codes[i]) * scales[i / kQuantBlock]; }
};

Quantized Quantize(const std::vector<float>& x, bool power_of_two_scales = false) {
  Quantized q;
  q.codes.resize(x.size());
  q.scales.resize(CeilDiv(static_cast<int64_t>(x.size()), kQuantBlock));
  QuantizeRow(x, power_of_two_scales, absl::MakeSpan(q.codes), absl::MakeSpan(q.scales));
  return q;
}

TEST(QuantizeRow, TheLargestOfEachBlockBecomes448) {
  std::vector<float> x(200, 0.5f);
  x[3] = -7.0f;
  x[130] = 2.0f;
  const Quantized q = Quantize(x);
  ASSERT_EQ(q.scales.size(), 2u);
  EXPECT_EQ(q.scales[0], 7.0f / 448.0f);
  EXPECT_EQ(q.scales[1], 2.0f / 448.0f);
  EXPECT_EQ(ToFloat(q.codes[3]), -448.0f);
  EXPECT_EQ(ToFloat(q.codes[130]), 448.0f);
  EXPECT_EQ(ToFloat(q.codes[0]), 32.0f);     // 0.5 / (7 / 448) exactly
  EXPECT_EQ(ToFloat(q.codes[128]), 112.0f);  // 0.5 / (2 / 448) exactly
}

// V3.1: rounded up, never to nearest (then the largest value would overflow).
TEST(QuantizeRow, PowerOfTwoScalesAreRoundedUp) {
  for (const auto& [amax, scale] :
       {std::pair{448.0f, 1.0f}, {449.0f, 2.0f}, {896.0f, 2.0f}, {447.0f, 1.0f}, {7.0f, 0x1p-6f}}) {
    std::vector<float> x(130, 0.25f);
    x[5] = -amax;
    const Quantized q = Quantize(x, true);
    EXPECT_EQ(q.scales[0], scale) << amax;
    EXPECT_EQ(ToFloat(q.codes[5]), ToFloat(ToE4m3(-amax / scale)));
    EXPECT_EQ(q.Value(129), 0.25f);
  }
  EXPECT_EQ(Quantize(std::vector<float>(5, 0.0f), true).scales[0], 0x1p-22f);  // 1e-4 / 448
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(Quantize({1.0f, nan}, true).scales[0]));
}

TEST(QuantizeRow, AnAllZeroBlockHasTheFloorScale) {
  const Quantized q = Quantize(std::vector<float>(5, 0.0f));
  EXPECT_EQ(q.scales[0], 1e-4f / 448.0f);
  for (const E4m3 code : q.codes) EXPECT_EQ(code.bits, 0);
}

TEST(QuantizeRow, ANanOrInfinityPoisonsItsBlockAndNoOther) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    std::vector<float> x(140, 1.0f);
    x[7] = bad;
    const Quantized q = Quantize(x);
    EXPECT_TRUE(std::isnan(q.Value(0)));
    EXPECT_TRUE(std::isnan(q.Value(127)));
    EXPECT_EQ(q.Value(128), 1.0f);
  }
}

// A matrix of e4m3 ones, except for its scales.
struct Fp8Matrix {
  std::vector<E4m3> codes;
  std::vector<float> scales;
  MatrixView view;
  Fp8Matrix(int64_t rows, int64_t cols, std::vector<float> block_scales)
      : codes(static_cast<size_t>(rows * cols), E4m3{0x38}), scales(std::move(block_scales)) {
    view = {DType::kE4m3, rows, cols, reinterpret_cast<const std::byte*>(codes.data()),
            scales.data()};
  }
};

TEST(Fp8Weights, ScalesAreMultipliedPerBlockWithRaggedEdges) {
  const Fp8Matrix matrix(130, 129, {2.0f, 3.0f, 5.0f, 7.0f});
  EXPECT_EQ(WeightAt(matrix.view, 127, 127), 2.0f);
  EXPECT_EQ(WeightAt(matrix.view, 127, 128), 3.0f);
  EXPECT_EQ(WeightAt(matrix.view, 128, 0), 5.0f);
  EXPECT_EQ(WeightAt(matrix.view, 129, 128), 7.0f);
  std::vector<float> x(129, 1.0f), y(130);
  LinearRow(matrix.view, x, absl::MakeSpan(y));
  EXPECT_EQ(y[0], 128 * 2.0f + 3.0f);
  EXPECT_EQ(y[129], 128 * 5.0f + 7.0f);
}

TEST(ExpertFfn, FromCodesEqualsFromTheValuesTheyStandFor) {
  constexpr int64_t kHidden = 136, kInter = 130;
  const Fp8Matrix gate(kInter, kHidden, {0.01f, 0.02f, 0.03f, 0.04f});
  const Fp8Matrix up(kInter, kHidden, {0.02f, 0.01f, 0.05f, 0.03f});
  const Fp8Matrix down(kHidden, kInter, {0.5f, 0.25f, 0.125f, 1.0f});
  const ExpertWeights weights{gate.view, up.view, down.view};
  std::vector<float> x;
  for (int64_t i = 0; i < kHidden; ++i) x.push_back(std::sin(0.37f * static_cast<float>(i)));
  const Quantized q = Quantize(x);
  std::vector<float> from_codes(kHidden), expected(kHidden);
  ExpertFfnQuantizedRow(weights, q.codes, q.scales, false, Rounding::kQuantizedExperts,
                        absl::MakeSpan(from_codes));

  for (size_t i = 0; i < x.size(); ++i) x[i] = q.Value(i);
  std::vector<float> inner(kInter), inner_up(kInter);
  LinearRow(gate.view, x, absl::MakeSpan(inner));
  LinearRow(up.view, x, absl::MakeSpan(inner_up));
  SwiGluRow(inner, inner_up, Rounding::kFloat32, absl::MakeSpan(inner));
  const Quantized q_inner = Quantize(inner);
  for (size_t i = 0; i < inner.size(); ++i) inner[i] = q_inner.Value(i);
  LinearRow(down.view, inner, absl::MakeSpan(expected));
  for (int64_t i = 0; i < kHidden; ++i) {
    EXPECT_NEAR(from_codes[i], expected[i], 1e-5 * std::abs(expected[i]));
  }
}

float Combine(const std::vector<uint32_t>& ids, const std::vector<float>& weights,
              const std::vector<float>& values, int32_t group, Rounding rounding) {
  std::vector<ExpertId> experts;
  std::vector<const float*> rows;
  for (size_t i = 0; i < ids.size(); ++i) {
    experts.emplace_back(ids[i]);
    rows.push_back(&values[i]);
  }
  float out = 0;
  CombineRow(experts, weights, rows, group, rounding, absl::MakeSpan(&out, 1));
  return out;
}

TEST(Combine, IsTheWeightedSum) {
  EXPECT_EQ(Combine({0, 5, 9}, {0.5f, 2.0f, 1.0f}, {4.0f, 3.0f, -1.0f}, 4, Rounding::kFloat32),
            7.0f);
}

TEST(Combine, RoundsEachGroupAndThenTheirSum) {
  // bf16 has steps of 2^-7 above 1. In one group the two parts add up to 1.5 half steps before
  // rounding, in two groups the first part is rounded away.
  const float part = 0.75f / 256.0f;
  EXPECT_EQ(Combine({0, 1}, {1, 1}, {1 + part, part}, 2, Rounding::kServing), 1 + 1.0f / 128.0f);
  EXPECT_EQ(Combine({0, 1}, {1, 1}, {1 + part, part}, 1, Rounding::kServing), 1.0f);
}

TEST(Combine, OneGroupModelsUseSubGroupsOf32) {
  EXPECT_EQ(CombineGroupSize({.n_routed_experts = 40, .n_group = 1}), 32);
  EXPECT_EQ(CombineGroupSize({.n_routed_experts = 256, .n_group = 8}), 32);
  EXPECT_EQ(CombineGroupSize({.n_routed_experts = 16, .n_group = 4}), 4);
}

}  // namespace
}  // namespace moebius::kernels::reference
