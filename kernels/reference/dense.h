#pragma once

// One row of each dense operation (kernels/linear.h), in float32, in the most obvious order. Spans
// have exactly the sizes given; outputs do not alias inputs unless said. Pure functions, any
// thread.

#include "absl/types/span.h"
#include "base/tensor_view.h"
#include "kernels/reference/rounding.h"

namespace moebius::kernels::reference {

// W[row][col] in float32, its FP8 scale applied.
float WeightAt(const MatrixView& weight, int64_t row, int64_t col);

// out[n] = sum over k of x[k] * W[n][k], unrounded. K is summed in blocks of 128, each from zero;
// acc = fma(scale, block sum, acc) for FP8, acc + block sum otherwise.
void LinearRow(const MatrixView& weight, absl::Span<const float> x, absl::Span<float> out);

// out = x * rsqrt(mean(x^2) + eps) * weight, rounded once. May alias x.
void RmsNormRow(absl::Span<const float> x, absl::Span<const float> weight, float eps,
                Rounding rounding, absl::Span<float> out);

// out = silu(gate) * up, silu(z) = z / (1 + exp(-z)), rounded once. May alias either input.
void SwiGluRow(absl::Span<const float> gate, absl::Span<const float> up, Rounding rounding,
               absl::Span<float> out);

// h = h + y, rounded once.
void ResidualAddRow(absl::Span<const float> y, Rounding rounding, absl::Span<float> h);

}  // namespace moebius::kernels::reference
