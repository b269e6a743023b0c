#pragma once

// One row of multi-head latent attention (kernels/attention.h; DeepSeek-V2 report section 2.1).
// Pure functions, any thread.

#include <vector>

#include "absl/types/span.h"
#include "base/tensor_view.h"
#include "kernels/attention.h"
#include "kernels/reference/rounding.h"

namespace moebius::kernels::reference {

// Rotates interleaved pairs (2i, 2i+1) of `x` [qk_rope_head_dim] in place by the angles of one
// position; cos_sin is [qk_rope_head_dim / 2, 2] with cos first. One rounding.
void RotateRow(absl::Span<const float> cos_sin, Rounding rounding, absl::Span<float> x);

// The latent-cache row of one token from the raw kv_a output `kv` [latent_dim]: only the latent is
// normalised, only the rope key is rotated.
void LatentRow(const MlaDims& dims, absl::Span<const float> kv, absl::Span<const float> kv_norm,
               float kv_norm_eps, absl::Span<const float> cos_sin, Rounding rounding,
               absl::Span<float> out);

// kv_b in float32, [num_heads * (qk_nope + v), kv_lora_rank]; kServing rounds each weight to BF16
// after its scale, as the absorbed form uses it.
std::vector<float> ExpandKvB(const MatrixView& kv_b, Rounding rounding);

// The absorbed form for one query row `q` [num_heads, q_head_dim], rotated, over the latent rows of
// positions 0..t. `out` is [num_heads, v_head_dim]. The softmax is the textbook one (maximum,
// exponentials, sum, in ascending position), which an online softmax equals up to rounding.
void MlaAttentionRow(const MlaDims& dims, absl::Span<const float> q, absl::Span<const float> kv_b,
                     float softmax_scale, absl::Span<const float* const> latents, Rounding rounding,
                     absl::Span<float> out);

}  // namespace moebius::kernels::reference
