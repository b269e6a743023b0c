#pragma once

// Row quantisation, one row of one expert, and the canonical sum (kernels/moe.h). Pure, any thread.

#include "absl/types/span.h"
#include "base/ids.h"
#include "kernels/moe.h"
#include "kernels/reference/rounding.h"

namespace moebius::kernels::reference {

// 1x128 blocks (DeepSeek-V3 report section 3.3.2): amax = max(max|x|, 1e-4), scale = amax / 448,
// code = e4m3(x / scale). scales is [ceil(n / 128)]. A NaN or infinity makes its block's amax, and
// so every code of the block, NaN. power_of_two_scales: the scale is rounded up to a power of two.
void QuantizeRow(absl::Span<const float> x, bool power_of_two_scales, absl::Span<E4m3> codes,
                 absl::Span<float> scales);

// down(silu(x gate^T) * (x up^T)) for one row of float or BF16 values; the product is rounded
// before down, the result at the end.
void ExpertFfnRow(const ExpertWeights& weights, absl::Span<const float> x, Rounding rounding,
                  absl::Span<float> out);

// The same from e4m3 codes: each 128-block of K is summed from zero and multiplied by both scales,
// and the SwiGLU output (after its rounding) is quantised again before down.
void ExpertFfnQuantizedRow(const ExpertWeights& weights, absl::Span<const E4m3> codes,
                           absl::Span<const float> scales, bool power_of_two_scales,
                           Rounding rounding, absl::Span<float> out);

// The canonical sum of one token's expert rows; experts ascending, rows[j] of out.size() values.
// Groups are experts_per_group consecutive ids; each partial sum is rounded, then their total.
void CombineRow(absl::Span<const ExpertId> experts, absl::Span<const float> weights,
                absl::Span<const float* const> rows, int32_t experts_per_group, Rounding rounding,
                absl::Span<float> out);

}  // namespace moebius::kernels::reference
