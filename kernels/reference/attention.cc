#include "kernels/reference/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "kernels/reference/dense.h"

namespace moebius::kernels::reference {

void RotateRow(absl::Span<const float> cos_sin, Rounding rounding, absl::Span<float> x) {
  CHECK_EQ(cos_sin.size(), x.size());
  for (size_t i = 0; i < x.size(); i += 2) {
    const float even = x[i], odd = x[i + 1];
    const float cos = cos_sin[i], sin = cos_sin[i + 1];
    x[i] = RoundActivation(even * cos - odd * sin, rounding);
    x[i + 1] = RoundActivation(even * sin + odd * cos, rounding);
  }
}

void LatentRow(const MlaDims& dims, absl::Span<const float> kv, absl::Span<const float> kv_norm,
               float kv_norm_eps, absl::Span<const float> cos_sin, Rounding rounding,
               absl::Span<float> out) {
  CHECK_EQ(static_cast<int64_t>(kv.size()), dims.latent_dim());
  CHECK_EQ(static_cast<int64_t>(out.size()), dims.latent_dim());
  const size_t rank = static_cast<size_t>(dims.kv_lora_rank);
  RmsNormRow(kv.first(rank), kv_norm, kv_norm_eps, rounding, out.first(rank));
  std::copy(kv.begin() + rank, kv.end(), out.begin() + rank);
  RotateRow(cos_sin, rounding, out.subspan(rank));
}

std::vector<float> ExpandKvB(const MatrixView& kv_b, Rounding rounding) {
  std::vector<float> values;
  values.reserve(static_cast<size_t>(kv_b.rows * kv_b.cols));
  for (int64_t row = 0; row < kv_b.rows; ++row) {
    for (int64_t col = 0; col < kv_b.cols; ++col) {
      values.push_back(RoundActivation(WeightAt(kv_b, row, col), rounding));
    }
  }
  return values;
}

void MlaAttentionRow(const MlaDims& dims, absl::Span<const float> q, absl::Span<const float> kv_b,
                     float softmax_scale, absl::Span<const float* const> latents, Rounding rounding,
                     absl::Span<float> out) {
  const int64_t rank = dims.kv_lora_rank, nope = dims.qk_nope_head_dim, v = dims.v_head_dim;
  CHECK_EQ(static_cast<int64_t>(q.size()), dims.num_heads * dims.q_head_dim());
  CHECK_EQ(static_cast<int64_t>(kv_b.size()), dims.num_heads * (nope + v) * rank);
  CHECK_EQ(static_cast<int64_t>(out.size()), dims.num_heads * v);
  CHECK(!latents.empty());
  std::vector<float> q_latent(rank), u(rank), p(latents.size());
  for (int64_t h = 0; h < dims.num_heads; ++h) {
    const float* q_nope = q.data() + h * dims.q_head_dim();
    const float* q_rope = q_nope + nope;
    const float* k_rows = kv_b.data() + h * (nope + v) * rank;  // K_h, [nope, rank]
    const float* v_rows = k_rows + nope * rank;                 // V_h, [v, rank]

    for (int64_t j = 0; j < rank; ++j) {
      float sum = 0.0f;
      for (int64_t d = 0; d < nope; ++d) sum += q_nope[d] * k_rows[d * rank + j];
      q_latent[j] = RoundActivation(sum, rounding);
    }

    float maximum = -std::numeric_limits<float>::infinity();
    for (size_t s = 0; s < latents.size(); ++s) {
      const float* latent = latents[s];
      float score = 0.0f;
      for (int64_t j = 0; j < rank; ++j) score += q_latent[j] * latent[j];
      for (int64_t d = 0; d < dims.qk_rope_head_dim; ++d) score += q_rope[d] * latent[rank + d];
      p[s] = score * softmax_scale;
      maximum = std::max(maximum, p[s]);
    }
    float sum = 0.0f;
    for (float& value : p) {
      value = std::exp(value - maximum);
      sum += value;
    }

    std::fill(u.begin(), u.end(), 0.0f);
    for (size_t s = 0; s < latents.size(); ++s) {
      for (int64_t j = 0; j < rank; ++j) u[j] += p[s] * latents[s][j];
    }
    for (float& value : u) value = RoundActivation(value / sum, rounding);

    for (int64_t i = 0; i < v; ++i) {
      float value = 0.0f;
      for (int64_t j = 0; j < rank; ++j) value += v_rows[i * rank + j] * u[j];
      out[h * v + i] = RoundActivation(value, rounding);
    }
  }
}

}  // namespace moebius::kernels::reference
