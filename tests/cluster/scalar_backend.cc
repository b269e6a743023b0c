#include "tests/cluster/scalar_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/check.h"
#include "base/hash.h"
#include "base/prng.h"

namespace moebius::cluster_test {
namespace {

float Silu(float z) { return z / (1.0f + std::exp(-z)); }

const Bf16* CacheRow(const Bf16* cache, const kernels::SequenceRow& row, int64_t t, int64_t dim) {
  const int64_t block = row.block_table[t / kernels::kCacheBlockTokens];
  return cache + (block * kernels::kCacheBlockTokens + t % kernels::kCacheBlockTokens) * dim;
}

void NormRow(const Bf16* x, int64_t dim, const float* weight, float eps, Bf16* out) {
  float squares = 0;
  for (int64_t k = 0; k < dim; ++k) squares += ToFloat(x[k]) * ToFloat(x[k]);
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
  for (int64_t k = 0; k < dim; ++k) out[k] = ToBf16(ToFloat(x[k]) * scale * weight[k]);
}

// In place is allowed. cos_sin: [dim / 2, 2] of the row's position.
void Rotate(const Bf16* x, int64_t dim, const float* cos_sin, Bf16* out) {
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
    const float a = ToFloat(x[2 * i]), b = ToFloat(x[2 * i + 1]);
    out[2 * i] = ToBf16(a * c - b * s);
    out[2 * i + 1] = ToBf16(a * s + b * c);
  }
}

}  // namespace

const DecodedWeights::Matrix& DecodedWeights::Get(const MatrixView& view) {
  Matrix& matrix = matrices_[view.data];
  if (matrix.rows.empty()) {
    matrix.rows.resize(view.rows * view.cols);
    matrix.columns.resize(view.rows * view.cols);
    for (int64_t i = 0; i < view.rows; ++i) {
      for (int64_t j = 0; j < view.cols; ++j) {
        const int64_t at = i * view.cols + j;
        float value = 0;
        switch (view.dtype) {
          case DType::kF32:
            value = reinterpret_cast<const float*>(view.data)[at];
            break;
          case DType::kBf16:
            value = ToFloat(reinterpret_cast<const Bf16*>(view.data)[at]);
            break;
          case DType::kE4m3:
            value = ToFloat(reinterpret_cast<const E4m3*>(view.data)[at]) *
                    view.scale_inv[(i / kQuantBlock) * CeilDiv(view.cols, kQuantBlock) +
                                   j / kQuantBlock];
            break;
        }
        matrix.rows[at] = value;
        matrix.columns[j * view.rows + i] = value;
      }
    }
  }
  CHECK_EQ(static_cast<int64_t>(matrix.rows.size()), view.rows * view.cols);
  return matrix;
}

void ScalarBackend::Product(const MatrixView& weight, const float* x, float* sums) {
  const float* columns = weights_->Get(weight).columns.data();
  std::fill_n(sums, weight.rows, 0.0f);
  for (int64_t k = 0; k < weight.cols; ++k) {
    const float value = x[k];
    const float* column = columns + k * weight.rows;
    for (int64_t n = 0; n < weight.rows; ++n) sums[n] += value * column[n];
  }
}

absl::Status ScalarBackend::Embed(const kernels::EmbedParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    CHECK(p.ids[i] >= 0 && p.ids[i] < p.table.rows);
    const auto* row = reinterpret_cast<const Bf16*>(p.table.data) + p.ids[i] * p.table.cols;
    std::copy_n(row, p.table.cols, p.out + i * p.table.cols);
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::RmsNorm(const kernels::RmsNormParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    NormRow(p.x + i * p.x_stride, p.dim, p.weight, p.eps, p.out + i * p.out_stride);
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::Linear(const kernels::LinearParams& p) {
  x_.resize(p.weight.cols);
  sums_.resize(p.weight.rows);
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t k = 0; k < p.weight.cols; ++k) x_[k] = ToFloat(p.x[i * p.x_stride + k]);
    Product(p.weight, x_.data(), sums_.data());
    for (int64_t n = 0; n < p.weight.rows; ++n) {
      if (p.out_f32 != nullptr) {
        p.out_f32[i * p.out_stride + n] = sums_[n];
      } else {
        p.out_bf16[i * p.out_stride + n] = ToBf16(sums_[n]);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::SwiGlu(const kernels::SwiGluParams& p) {
  for (int64_t i = 0; i < p.m * p.dim; ++i) {
    p.out[i] = ToBf16(Silu(ToFloat(p.gate[i])) * ToFloat(p.up[i]));
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::ResidualAdd(const kernels::ResidualAddParams& p) {
  for (int64_t i = 0; i < p.m * p.dim; ++i) p.h[i] = ToBf16(ToFloat(p.h[i]) + ToFloat(p.y[i]));
  return absl::OkStatus();
}

absl::Status ScalarBackend::MoeResidual(const kernels::MoeResidualParams& p) {
  for (int64_t i = 0; i < p.m * p.dim; ++i) {
    const Bf16 y = ToBf16(ToFloat(p.routed[i]) + ToFloat(p.shared[i]));
    p.h[i] = ToBf16(ToFloat(p.h[i]) + ToFloat(y));
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::RopeAndCache(const kernels::RopeAndCacheParams& p) {
  const kernels::MlaDims& d = p.dims;
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t t = p.rows[i].position;
    const float* cos_sin = p.cos_sin + t * d.qk_rope_head_dim;
    for (int64_t h = 0; h < d.num_heads; ++h) {
      Bf16* q = p.q + (i * d.num_heads + h) * d.q_head_dim() + d.qk_nope_head_dim;
      Rotate(q, d.qk_rope_head_dim, cos_sin, q);
    }
    Bf16* row = const_cast<Bf16*>(CacheRow(p.cache, p.rows[i], t, d.latent_dim()));
    const Bf16* kv = p.kv + i * p.kv_stride;
    NormRow(kv, d.kv_lora_rank, p.kv_norm, p.kv_norm_eps, row);
    Rotate(kv + d.kv_lora_rank, d.qk_rope_head_dim, cos_sin, row + d.kv_lora_rank);
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::MlaAttention(const kernels::MlaAttentionParams& p) {
  const kernels::MlaDims& d = p.dims;
  const int64_t rank = d.kv_lora_rank, nope = d.qk_nope_head_dim, v_dim = d.v_head_dim;
  const float* kv_b = weights_->Get(p.kv_b).rows.data();
  std::vector<float>& q_latent = x_;
  std::vector<float>& u = sums_;
  q_latent.resize(rank);
  u.resize(rank);
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t keys = p.rows[i].position + 1;
    scores_.resize(keys);
    for (int64_t h = 0; h < d.num_heads; ++h) {
      const Bf16* q = p.q + (i * d.num_heads + h) * d.q_head_dim();
      const float* k_rows = kv_b + h * (nope + v_dim) * rank;
      const float* v_rows = k_rows + nope * rank;
      std::fill(q_latent.begin(), q_latent.end(), 0.0f);
      for (int64_t n = 0; n < nope; ++n) {
        const float value = ToFloat(q[n]);
        for (int64_t k = 0; k < rank; ++k) q_latent[k] += value * k_rows[n * rank + k];
      }
      for (float& value : q_latent) value = ToFloat(ToBf16(value));
      float largest = -INFINITY;
      for (int64_t s = 0; s < keys; ++s) {
        const Bf16* row = CacheRow(p.cache, p.rows[i], s, d.latent_dim());
        float sum = 0;
        for (int64_t k = 0; k < rank; ++k) sum += q_latent[k] * ToFloat(row[k]);
        for (int64_t k = 0; k < d.qk_rope_head_dim; ++k) {
          sum += ToFloat(q[nope + k]) * ToFloat(row[rank + k]);
        }
        scores_[s] = sum * p.softmax_scale;
        largest = std::max(largest, scores_[s]);
      }
      float total = 0;
      std::fill(u.begin(), u.end(), 0.0f);
      for (int64_t s = 0; s < keys; ++s) {
        const Bf16* row = CacheRow(p.cache, p.rows[i], s, d.latent_dim());
        const float weight = std::exp(scores_[s] - largest);
        total += weight;
        for (int64_t k = 0; k < rank; ++k) u[k] += weight * ToFloat(row[k]);
      }
      for (float& value : u) value = ToFloat(ToBf16(value / total));
      for (int64_t n = 0; n < v_dim; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < rank; ++k) sum += u[k] * v_rows[n * rank + k];
        p.out[(i * d.num_heads + h) * v_dim + n] = ToBf16(sum);
      }
    }
  }
  return absl::OkStatus();
}

// Sigmoid scores, bias for the choice alone, groups by the sum of their best two (DeepSeek-V3
// report section 2.1.2).
absl::Status ScalarBackend::GateSelect(const kernels::GateSelectParams& p) {
  const kernels::GateConfig& g = p.config;
  CHECK(g.scoring_func == kernels::ScoringFunc::kSigmoid &&
        g.topk_method == kernels::TopkMethod::kNoauxTc);
  const int32_t count = g.n_routed_experts;
  const int32_t per_group = count / g.n_group;
  std::vector<float> score(count), biased(count);
  std::vector<std::pair<float, int32_t>> order;  // negated value, index: ties to the lower index
  for (int64_t i = 0; i < p.m; ++i) {
    for (int32_t e = 0; e < count; ++e) {
      score[e] = 1.0f / (1.0f + std::exp(-p.logits[i * count + e]));
      biased[e] = score[e] + (p.bias != nullptr ? p.bias[e] : 0.0f);
    }
    order.clear();
    for (int32_t group = 0; group < g.n_group; ++group) {
      float best = -INFINITY, second = -INFINITY;
      for (int32_t e = group * per_group; e < (group + 1) * per_group; ++e) {
        if (biased[e] > best) {
          second = best;
          best = biased[e];
        } else {
          second = std::max(second, biased[e]);
        }
      }
      order.push_back({-(per_group > 1 ? best + second : best), group});
    }
    std::sort(order.begin(), order.end());
    std::vector<bool> kept(g.n_group, false);
    for (int32_t k = 0; k < g.topk_group; ++k) kept[order[k].second] = true;
    order.clear();
    for (int32_t e = 0; e < count; ++e) {
      if (kept[e / per_group]) order.push_back({-biased[e], e});
    }
    std::sort(order.begin(), order.end());
    std::sort(order.begin(), order.begin() + g.num_experts_per_tok,
              [](const auto& a, const auto& b) { return a.second < b.second; });
    float total = 0;
    for (int32_t k = 0; k < g.num_experts_per_tok; ++k) total += score[order[k].second];
    for (int32_t k = 0; k < g.num_experts_per_tok; ++k) {
      const int64_t at = i * g.num_experts_per_tok + k;
      p.experts[at] = ExpertId(static_cast<uint32_t>(order[k].second));
      const float weight = score[order[k].second];
      p.weights[at] =
          (g.norm_topk_prob ? weight / (total + 1e-20f) : weight) * g.routed_scaling_factor;
    }
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::QuantizeRows(const kernels::QuantizeRowsParams& p) {
  const int64_t blocks = CeilDiv(p.dim, kQuantBlock);
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = std::min(p.dim, (b + 1) * kQuantBlock);
      float amax = 1e-4f;
      for (int64_t k = b * kQuantBlock; k < end; ++k) {
        amax = std::max(amax, std::fabs(ToFloat(p.x[i * p.dim + k])));
      }
      float scale = amax / 448.0f;
      if (p.power_of_two_scales) scale = std::exp2(std::ceil(std::log2(scale)));
      p.scales[i * blocks + b] = scale;
      for (int64_t k = b * kQuantBlock; k < end; ++k) {
        p.codes[i * p.dim + k] = ToE4m3(ToFloat(p.x[i * p.dim + k]) / scale);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::ExpertFfn(const kernels::ExpertFfnParams& p) {
  const int64_t blocks = CeilDiv(p.hidden, kQuantBlock);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    const kernels::ExpertWeights& weights = p.groups[g].weights;
    for (int64_t i = p.groups[g].begin; i < p.groups[g].end; ++i) {
      const int64_t row = p.row_index != nullptr ? p.row_index[i] : i;
      x_.resize(p.hidden);
      for (int64_t k = 0; k < p.hidden; ++k) {
        x_[k] = p.x_codes != nullptr ? ToFloat(p.x_codes[row * p.hidden + k]) *
                                           p.x_scales[row * blocks + k / kQuantBlock]
                                     : ToFloat(p.x_bf16[row * p.hidden + k]);
      }
      sums_.resize(p.intermediate);
      more_sums_.resize(p.intermediate);
      Product(weights.gate_proj, x_.data(), sums_.data());
      Product(weights.up_proj, x_.data(), more_sums_.data());
      for (int64_t n = 0; n < p.intermediate; ++n) {
        sums_[n] = ToFloat(ToBf16(Silu(sums_[n]) * more_sums_[n]));
      }
      more_sums_.resize(p.hidden);
      Product(weights.down_proj, sums_.data(), more_sums_.data());
      for (int64_t n = 0; n < p.hidden; ++n) p.out[i * p.hidden + n] = ToBf16(more_sums_[n]);
    }
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::Combine(const kernels::CombineParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    const ExpertId* experts = p.experts + i * p.top_k;
    const float* weights = p.weights + i * p.top_k;
    const Bf16* const* rows = p.rows + i * p.top_k;
    for (int64_t n = 0; n < p.dim; ++n) {
      float total = 0;
      for (int32_t k = 0; k < p.top_k;) {
        const uint32_t group = experts[k].value() / p.experts_per_group;
        float chain = weights[k] * ToFloat(rows[k][n]);
        for (++k; k < p.top_k && experts[k].value() / p.experts_per_group == group; ++k) {
          chain = std::fma(weights[k], ToFloat(rows[k][n]), chain);
        }
        total += ToFloat(ToBf16(chain));
      }
      p.out[i * p.dim + n] = ToBf16(total);
    }
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::Sample(const kernels::SampleParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    SampleRow(p.logits + i * p.logits_stride, p.vocab, p.params[i], p.token_index[i], &p.tokens[i],
              &p.logprobs[i]);
  }
  return absl::OkStatus();
}

// Temperature alone: filters are the kernels' own tests' business.
void ScalarBackend::SampleRow(const float* logits, int64_t vocab,
                              const kernels::SamplingParams& params, uint64_t token_index,
                              TokenId* token, float* logprob) {
  int64_t best = 0;
  for (int64_t v = 1; v < vocab; ++v) {
    if (logits[v] > logits[best]) best = v;
  }
  double total = 0;
  for (int64_t v = 0; v < vocab; ++v) total += std::exp(double{logits[v]} - logits[best]);
  int64_t chosen = best;
  if (params.temperature > 0) {
    const auto mass = [&](int64_t v) {
      return std::exp((double{logits[v]} - logits[best]) / params.temperature);
    };
    double sum = 0;
    for (int64_t v = 0; v < vocab; ++v) sum += mass(v);
    double left = sum * ToUnitFloat(CounterDraw(params.seed, 0, token_index));
    for (chosen = 0; chosen + 1 < vocab; ++chosen) {
      left -= mass(chosen);
      if (left < 0) break;
    }
  }
  *token = static_cast<TokenId>(chosen);
  *logprob = (logits[chosen] - logits[best]) - static_cast<float>(std::log(total));
}

absl::Status ScalarBackend::TokenLogprobs(const kernels::TokenLogprobsParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    const float* logits = p.logits + i * p.logits_stride;
    const float best = *std::max_element(logits, logits + p.vocab);
    double total = 0;
    for (int64_t v = 0; v < p.vocab; ++v) total += std::exp(double{logits[v]} - best);
    for (int64_t j = i * p.per_row; j < (i + 1) * p.per_row; ++j) {
      p.logprobs[j] = p.tokens[j] == -1
                          ? 0
                          : (logits[p.tokens[j]] - best) - static_cast<float>(std::log(total));
    }
  }
  return absl::OkStatus();
}

absl::Status ScalarBackend::RowDigest(const kernels::RowDigestParams& p) {
  bytes_.resize(p.dim * sizeof(Bf16) + sizeof(float));
  for (int64_t i = 0; i < p.m; ++i) {
    std::memcpy(bytes_.data(), p.hidden + i * p.hidden_stride, p.dim * sizeof(Bf16));
    std::memcpy(bytes_.data() + p.dim * sizeof(Bf16), p.logprobs + i, sizeof(float));
    p.digests[i] = Hash64(bytes_.data(), bytes_.size());
  }
  return absl::OkStatus();
}

}  // namespace moebius::cluster_test
