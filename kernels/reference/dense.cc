#include "kernels/reference/dense.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"

namespace moebius::kernels::reference {
namespace {

// The element as stored, before any scale.
float StoredAt(const MatrixView& weight, int64_t row, int64_t col) {
  const std::byte* element = weight.data + (row * weight.cols + col) * SizeOf(weight.dtype);
  switch (weight.dtype) {
    case DType::kF32: {
      float value;
      std::memcpy(&value, element, sizeof(value));
      return value;
    }
    case DType::kBf16: {
      Bf16 value;
      std::memcpy(&value, element, sizeof(value));
      return ToFloat(value);
    }
    case DType::kE4m3:
      return ToFloat(E4m3{static_cast<uint8_t>(*element)});
  }
  return 0.0f;
}

float ScaleAt(const MatrixView& weight, int64_t row, int64_t col) {
  if (weight.dtype != DType::kE4m3) return 1.0f;
  const int64_t block_cols = CeilDiv(weight.cols, kQuantBlock);
  return weight.scale_inv[row / kQuantBlock * block_cols + col / kQuantBlock];
}

}  // namespace

float WeightAt(const MatrixView& weight, int64_t row, int64_t col) {
  return StoredAt(weight, row, col) * ScaleAt(weight, row, col);
}

void LinearRow(const MatrixView& weight, absl::Span<const float> x, absl::Span<float> out) {
  CHECK_EQ(static_cast<int64_t>(x.size()), weight.cols);
  CHECK_EQ(static_cast<int64_t>(out.size()), weight.rows);
  for (int64_t n = 0; n < weight.rows; ++n) {
    float acc = 0.0f;
    for (int64_t begin = 0; begin < weight.cols; begin += kQuantBlock) {
      const int64_t end = std::min(begin + kQuantBlock, weight.cols);
      float part = 0.0f;
      for (int64_t k = begin; k < end; ++k) part += x[k] * StoredAt(weight, n, k);
      acc = std::fma(ScaleAt(weight, n, begin), part, acc);
    }
    out[n] = acc;
  }
}

void RmsNormRow(absl::Span<const float> x, absl::Span<const float> weight, float eps,
                Rounding rounding, absl::Span<float> out) {
  CHECK_EQ(x.size(), weight.size());
  CHECK_EQ(x.size(), out.size());
  float sum = 0.0f;
  for (const float value : x) sum += value * value;
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(x.size()) + eps);
  for (size_t i = 0; i < x.size(); ++i) {
    out[i] = RoundActivation(x[i] * scale * weight[i], rounding);
  }
}

void SwiGluRow(absl::Span<const float> gate, absl::Span<const float> up, Rounding rounding,
               absl::Span<float> out) {
  CHECK_EQ(gate.size(), up.size());
  CHECK_EQ(gate.size(), out.size());
  for (size_t i = 0; i < gate.size(); ++i) {
    const float silu = gate[i] / (1.0f + std::exp(-gate[i]));
    out[i] = RoundActivation(silu * up[i], rounding);
  }
}

void ResidualAddRow(absl::Span<const float> y, Rounding rounding, absl::Span<float> h) {
  CHECK_EQ(y.size(), h.size());
  for (size_t i = 0; i < h.size(); ++i) h[i] = RoundActivation(h[i] + y[i], rounding);
}

}  // namespace moebius::kernels::reference
