#include "kernels/reference/reference_backend.h"

#include <bit>
#include <vector>

#include "absl/types/span.h"
#include "base/check.h"
#include "base/hash.h"
#include "kernels/reference/attention.h"
#include "kernels/reference/dense.h"
#include "kernels/reference/experts.h"
#include "kernels/reference/gate.h"
#include "kernels/reference/sampling.h"

namespace moebius::kernels::reference {
namespace {

constexpr Rounding kServing = Rounding::kServing;

std::vector<float> ToFloats(const Bf16* values, int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) out[i] = ToFloat(values[i]);
  return out;
}

void Store(absl::Span<const float> values, Bf16* out) {
  for (size_t i = 0; i < values.size(); ++i) out[i] = ToBf16(values[i]);
}

// Cache row of `position` in the sequence that owns `block_table`.
int64_t CacheRow(const SequenceRow& row, int64_t position) {
  return row.block_table[position / kCacheBlockTokens] * kCacheBlockTokens +
         position % kCacheBlockTokens;
}

}  // namespace

std::string ReferenceBackend::NumericsName() const { return "reference-v1"; }

absl::Status ReferenceBackend::Embed(const EmbedParams& p) {
  CHECK(p.table.dtype == DType::kBf16);
  for (int64_t i = 0; i < p.m; ++i) {
    CHECK(p.ids[i] >= 0 && p.ids[i] < p.table.rows);
    for (int64_t d = 0; d < p.table.cols; ++d) {
      p.out[i * p.table.cols + d] = ToBf16(WeightAt(p.table, p.ids[i], d));
    }
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::RmsNorm(const RmsNormParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    std::vector<float> x = ToFloats(p.x + i * p.x_stride, p.dim);
    RmsNormRow(x, absl::MakeConstSpan(p.weight, p.dim), p.eps, kServing, absl::MakeSpan(x));
    Store(x, p.out + i * p.out_stride);
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::Linear(const LinearParams& p) {
  CHECK((p.out_bf16 == nullptr) != (p.out_f32 == nullptr));
  std::vector<float> out(static_cast<size_t>(p.weight.rows));
  for (int64_t i = 0; i < p.m; ++i) {
    LinearRow(p.weight, ToFloats(p.x + i * p.x_stride, p.weight.cols), absl::MakeSpan(out));
    if (p.out_bf16 != nullptr) {
      Store(out, p.out_bf16 + i * p.out_stride);
    } else {
      std::copy(out.begin(), out.end(), p.out_f32 + i * p.out_stride);
    }
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::SwiGlu(const SwiGluParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    std::vector<float> gate = ToFloats(p.gate + i * p.dim, p.dim);
    SwiGluRow(gate, ToFloats(p.up + i * p.dim, p.dim), kServing, absl::MakeSpan(gate));
    Store(gate, p.out + i * p.dim);
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::ResidualAdd(const ResidualAddParams& p) {
  std::vector<float> h = ToFloats(p.h, p.m * p.dim);
  ResidualAddRow(ToFloats(p.y, p.m * p.dim), kServing, absl::MakeSpan(h));
  Store(h, p.h);
  return absl::OkStatus();
}

absl::Status ReferenceBackend::MoeResidual(const MoeResidualParams& p) {
  std::vector<float> y = ToFloats(p.routed, p.m * p.dim);
  ResidualAddRow(ToFloats(p.shared, p.m * p.dim), kServing, absl::MakeSpan(y));
  std::vector<float> h = ToFloats(p.h, p.m * p.dim);
  ResidualAddRow(y, kServing, absl::MakeSpan(h));
  Store(h, p.h);
  return absl::OkStatus();
}

absl::Status ReferenceBackend::RopeAndCache(const RopeAndCacheParams& p) {
  const int64_t rope = p.dims.qk_rope_head_dim, latent_dim = p.dims.latent_dim();
  std::vector<float> latent(static_cast<size_t>(latent_dim));
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t position = p.rows[i].position;
    const auto cos_sin = absl::MakeConstSpan(p.cos_sin + position * rope, rope);
    for (int64_t h = 0; h < p.dims.num_heads; ++h) {
      Bf16* q_rope =
          p.q + (i * p.dims.num_heads + h) * p.dims.q_head_dim() + p.dims.qk_nope_head_dim;
      std::vector<float> rotated = ToFloats(q_rope, rope);
      RotateRow(cos_sin, kServing, absl::MakeSpan(rotated));
      Store(rotated, q_rope);
    }
    LatentRow(p.dims, ToFloats(p.kv + i * p.kv_stride, latent_dim),
              absl::MakeConstSpan(p.kv_norm, p.dims.kv_lora_rank), p.kv_norm_eps, cos_sin, kServing,
              absl::MakeSpan(latent));
    Store(latent, p.cache + CacheRow(p.rows[i], position) * latent_dim);
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::MlaAttention(const MlaAttentionParams& p) {
  const int64_t latent_dim = p.dims.latent_dim();
  const int64_t q_dim = p.dims.num_heads * p.dims.q_head_dim();
  const int64_t out_dim = p.dims.num_heads * p.dims.v_head_dim;
  const std::vector<float> kv_b = ExpandKvB(p.kv_b, kServing);
  std::vector<float> out(static_cast<size_t>(out_dim));
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t keys = p.rows[i].position + 1;
    std::vector<float> latents;
    latents.reserve(static_cast<size_t>(keys * latent_dim));
    std::vector<const float*> rows;
    for (int64_t s = 0; s < keys; ++s) {
      const Bf16* row = p.cache + CacheRow(p.rows[i], s) * latent_dim;
      rows.push_back(latents.data() + latents.size());
      for (int64_t d = 0; d < latent_dim; ++d) latents.push_back(ToFloat(row[d]));
    }
    MlaAttentionRow(p.dims, ToFloats(p.q + i * q_dim, q_dim), kv_b, p.softmax_scale, rows, kServing,
                    absl::MakeSpan(out));
    Store(out, p.out + i * out_dim);
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::GateSelect(const GateSelectParams& p) {
  const size_t experts = static_cast<size_t>(p.config.n_routed_experts);
  const size_t top_k = static_cast<size_t>(p.config.num_experts_per_tok);
  const absl::Span<const float> bias(p.bias, p.bias == nullptr ? 0 : experts);
  for (int64_t i = 0; i < p.m; ++i) {
    GateSelectRow(p.config, absl::MakeConstSpan(p.logits + i * experts, experts), bias,
                  absl::MakeSpan(p.experts + i * top_k, top_k),
                  absl::MakeSpan(p.weights + i * top_k, top_k));
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::QuantizeRows(const QuantizeRowsParams& p) {
  const int64_t blocks = CeilDiv(p.dim, kQuantBlock);
  for (int64_t i = 0; i < p.m; ++i) {
    QuantizeRow(ToFloats(p.x + i * p.dim, p.dim), p.power_of_two_scales,
                absl::MakeSpan(p.codes + i * p.dim, p.dim),
                absl::MakeSpan(p.scales + i * blocks, blocks));
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::ExpertFfn(const ExpertFfnParams& p) {
  CHECK((p.x_codes == nullptr) != (p.x_bf16 == nullptr));
  const int64_t blocks = CeilDiv(p.hidden, kQuantBlock);
  std::vector<float> out(static_cast<size_t>(p.hidden));
  for (int64_t g = 0; g < p.num_groups; ++g) {
    const ExpertGroup& group = p.groups[g];
    for (int64_t i = group.begin; i < group.end; ++i) {
      CHECK(i >= 0 && i < p.m);
      const int64_t source = p.row_index == nullptr ? i : p.row_index[i];
      if (p.x_codes != nullptr) {
        ExpertFfnQuantizedRow(group.weights,
                              absl::MakeConstSpan(p.x_codes + source * p.hidden, p.hidden),
                              absl::MakeConstSpan(p.x_scales + source * blocks, blocks),
                              p.power_of_two_scales, kServing, absl::MakeSpan(out));
      } else {
        ExpertFfnRow(group.weights, ToFloats(p.x_bf16 + source * p.hidden, p.hidden), kServing,
                     absl::MakeSpan(out));
      }
      Store(out, p.out + i * p.hidden);
    }
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::Combine(const CombineParams& p) {
  std::vector<float> out(static_cast<size_t>(p.dim));
  for (int64_t i = 0; i < p.m; ++i) {
    std::vector<std::vector<float>> values;
    std::vector<const float*> rows;
    for (int32_t j = 0; j < p.top_k; ++j) {
      values.push_back(ToFloats(p.rows[i * p.top_k + j], p.dim));
      rows.push_back(values.back().data());
    }
    CombineRow(absl::MakeConstSpan(p.experts + i * p.top_k, p.top_k),
               absl::MakeConstSpan(p.weights + i * p.top_k, p.top_k), rows, p.experts_per_group,
               kServing, absl::MakeSpan(out));
    Store(out, p.out + i * p.dim);
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::Sample(const SampleParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    const auto logits = absl::MakeConstSpan(p.logits + i * p.logits_stride, p.vocab);
    p.tokens[i] = SampleRow(logits, p.params[i], p.token_index[i]);
    p.logprobs[i] = LogProbAt(logits, p.tokens[i]);
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::TokenLogprobs(const TokenLogprobsParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    const auto logits = absl::MakeConstSpan(p.logits + i * p.logits_stride, p.vocab);
    for (int64_t j = i * p.per_row; j < (i + 1) * p.per_row; ++j) {
      p.logprobs[j] = p.tokens[j] == -1 ? 0.0f : LogProbAt(logits, p.tokens[j]);
    }
  }
  return absl::OkStatus();
}

absl::Status ReferenceBackend::RowDigest(const RowDigestParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    p.digests[i] = Hash64(p.hidden + i * p.hidden_stride, static_cast<size_t>(p.dim) * sizeof(Bf16),
                          std::bit_cast<uint32_t>(p.logprobs[i]));
  }
  return absl::OkStatus();
}

}  // namespace moebius::kernels::reference
