#include "kernels/reference/experts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/check.h"
#include "base/tensor_view.h"
#include "kernels/reference/dense.h"

namespace moebius::kernels::reference {
namespace {

// out[n] = sum over K-blocks of (scale of x's block * scale of W's block) * (sum of code products).
void QuantizedLinearRow(const MatrixView& weight, absl::Span<const E4m3> codes,
                        absl::Span<const float> scales, absl::Span<float> out) {
  CHECK(weight.dtype == DType::kE4m3);
  CHECK_EQ(static_cast<int64_t>(codes.size()), weight.cols);
  CHECK_EQ(static_cast<int64_t>(out.size()), weight.rows);
  const int64_t blocks = CeilDiv(weight.cols, kQuantBlock);
  CHECK_EQ(static_cast<int64_t>(scales.size()), blocks);
  const E4m3* stored = reinterpret_cast<const E4m3*>(weight.data);
  for (int64_t n = 0; n < weight.rows; ++n) {
    float acc = 0.0f;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t end = std::min((block + 1) * kQuantBlock, weight.cols);
      float part = 0.0f;
      for (int64_t k = block * kQuantBlock; k < end; ++k) {
        part += ToFloat(codes[k]) * ToFloat(stored[n * weight.cols + k]);
      }
      acc = std::fma(scales[block] * weight.scale_inv[n / kQuantBlock * blocks + block], part, acc);
    }
    out[n] = acc;
  }
}

void RoundAll(Rounding rounding, absl::Span<float> values) {
  for (float& value : values) value = RoundActivation(value, rounding);
}

}  // namespace

void QuantizeRow(absl::Span<const float> x, bool power_of_two_scales, absl::Span<E4m3> codes,
                 absl::Span<float> scales) {
  const int64_t n = static_cast<int64_t>(x.size());
  CHECK_EQ(codes.size(), x.size());
  CHECK_EQ(static_cast<int64_t>(scales.size()), CeilDiv(n, kQuantBlock));
  for (int64_t begin = 0; begin < n; begin += kQuantBlock) {
    const int64_t end = std::min(begin + kQuantBlock, n);
    float amax = 1e-4f;
    for (int64_t i = begin; i < end; ++i) {
      if (!std::isfinite(x[i])) {
        amax = std::numeric_limits<float>::quiet_NaN();
        break;
      }
      amax = std::max(amax, std::abs(x[i]));
    }
    float scale = amax / 448.0f;
    if (power_of_two_scales) scale = RoundUpToPowerOfTwo(scale);
    scales[begin / kQuantBlock] = scale;
    for (int64_t i = begin; i < end; ++i) codes[i] = ToE4m3(x[i] / scale);
  }
}

void ExpertFfnRow(const ExpertWeights& weights, absl::Span<const float> x, Rounding rounding,
                  absl::Span<float> out) {
  std::vector<float> gate(weights.gate_proj.rows), up(weights.up_proj.rows);
  LinearRow(weights.gate_proj, x, absl::MakeSpan(gate));
  LinearRow(weights.up_proj, x, absl::MakeSpan(up));
  SwiGluRow(gate, up, rounding, absl::MakeSpan(gate));
  LinearRow(weights.down_proj, gate, out);
  RoundAll(rounding, out);
}

void ExpertFfnQuantizedRow(const ExpertWeights& weights, absl::Span<const E4m3> codes,
                           absl::Span<const float> scales, bool power_of_two_scales,
                           Rounding rounding, absl::Span<float> out) {
  const int64_t inner = weights.gate_proj.rows;
  std::vector<float> gate(inner), up(inner);
  QuantizedLinearRow(weights.gate_proj, codes, scales, absl::MakeSpan(gate));
  QuantizedLinearRow(weights.up_proj, codes, scales, absl::MakeSpan(up));
  SwiGluRow(gate, up, rounding, absl::MakeSpan(gate));
  std::vector<E4m3> inner_codes(inner);
  std::vector<float> inner_scales(CeilDiv(inner, kQuantBlock));
  QuantizeRow(gate, power_of_two_scales, absl::MakeSpan(inner_codes), absl::MakeSpan(inner_scales));
  QuantizedLinearRow(weights.down_proj, inner_codes, inner_scales, out);
  RoundAll(rounding, out);
}

void CombineRow(absl::Span<const ExpertId> experts, absl::Span<const float> weights,
                absl::Span<const float* const> rows, int32_t experts_per_group, Rounding rounding,
                absl::Span<float> out) {
  CHECK_EQ(experts.size(), weights.size());
  CHECK_EQ(experts.size(), rows.size());
  CHECK_GT(experts_per_group, 0);
  for (size_t i = 0; i < out.size(); ++i) {
    float total = 0.0f;
    for (size_t j = 0; j < experts.size();) {
      const uint32_t group = experts[j].value() / static_cast<uint32_t>(experts_per_group);
      float chain = weights[j] * rows[j][i];
      for (++j; j < experts.size() &&
                experts[j].value() / static_cast<uint32_t>(experts_per_group) == group;
           ++j) {
        CHECK_LT(experts[j - 1].value(), experts[j].value());
        chain = std::fma(weights[j], rows[j][i], chain);
      }
      total += RoundActivation(chain, rounding);
    }
    out[i] = RoundActivation(total, rounding);
  }
}

}  // namespace moebius::kernels::reference
