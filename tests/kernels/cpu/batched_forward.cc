#include "tests/kernels/cpu/batched_forward.h"

#include <algorithm>

#include "base/check.h"
#include "model/rope.h"
#include "tests/kernels/cpu/random_tensors.h"

namespace moebius::kernels::cpu {

BatchedForward::BatchedForward(const reference::ModelForward& model, Backend& backend,
                               int64_t num_blocks)
    : model_(model),
      backend_(backend),
      dims_{.num_heads = model.config.num_attention_heads,
            .qk_nope_head_dim = model.config.qk_nope_head_dim,
            .qk_rope_head_dim = model.config.qk_rope_head_dim,
            .v_head_dim = model.config.v_head_dim,
            .kv_lora_rank = model.config.kv_lora_rank},
      cos_sin_(model::RopeCosSinTable(model.config, num_blocks * kCacheBlockTokens)),
      caches_(model.weights.layers.size()) {
  for (std::vector<Bf16>& cache : caches_) {
    cache.assign(static_cast<size_t>(num_blocks * kCacheBlockTokens * dims_.latent_dim()),
                 Bf16{0x7FC0});
  }
}

std::vector<Bf16> BatchedForward::Norm(const std::vector<Bf16>& x, int64_t dim, const float* weight,
                                       double eps) {
  std::vector<Bf16> out(x.size());
  CHECK(backend_
            .RmsNorm({.m = static_cast<int64_t>(x.size()) / dim,
                      .dim = dim,
                      .x = x.data(),
                      .x_stride = dim,
                      .weight = weight,
                      .eps = static_cast<float>(eps),
                      .out = out.data(),
                      .out_stride = dim})
            .ok());
  return out;
}

std::vector<Bf16> BatchedForward::Linear(const MatrixView& weight, const std::vector<Bf16>& x) {
  const int64_t m = static_cast<int64_t>(x.size()) / weight.cols;
  std::vector<Bf16> out(static_cast<size_t>(m * weight.rows));
  CHECK(backend_
            .Linear({.m = m,
                     .weight = weight,
                     .x = x.data(),
                     .x_stride = weight.cols,
                     .out_bf16 = out.data(),
                     .out_stride = weight.rows})
            .ok());
  return out;
}

std::vector<Bf16> BatchedForward::Mlp(const model::MlpWeights& mlp, const std::vector<Bf16>& x) {
  std::vector<Bf16> gate = Linear(mlp.gate_proj, x);
  const std::vector<Bf16> up = Linear(mlp.up_proj, x);
  const int64_t m = static_cast<int64_t>(x.size()) / mlp.gate_proj.cols;
  CHECK(backend_
            .SwiGlu({.m = m,
                     .dim = mlp.gate_proj.rows,
                     .gate = gate.data(),
                     .up = up.data(),
                     .out = gate.data()})
            .ok());
  return Linear(mlp.down_proj, gate);
}

void BatchedForward::Attention(size_t index, std::vector<Bf16>& h,
                               const std::vector<SequenceRow>& rows) {
  const model::AttentionLayerWeights& layer = model_.weights.layers[index];
  const model::ModelConfig& config = model_.config;
  const int64_t m = static_cast<int64_t>(rows.size());
  const std::vector<Bf16> x =
      Norm(h, config.hidden_size, layer.input_layernorm.data(), config.rms_norm_eps);
  std::vector<Bf16> q;
  if (config.q_lora_rank) {
    q = Linear(layer.q_b_proj,
               Norm(Linear(layer.q_a_proj, x), *config.q_lora_rank, layer.q_a_layernorm.data(),
                    model::ModelConfig::kLatentNormEps));
  } else {
    q = Linear(layer.q_proj, x);
  }
  const std::vector<Bf16> kv = Linear(layer.kv_a_proj_with_mqa, x);
  std::vector<Bf16>& cache = caches_[index];
  CHECK(backend_
            .RopeAndCache({.m = m,
                           .dims = dims_,
                           .q = q.data(),
                           .kv = kv.data(),
                           .kv_stride = dims_.latent_dim(),
                           .kv_norm = layer.kv_a_layernorm.data(),
                           .kv_norm_eps = static_cast<float>(model::ModelConfig::kLatentNormEps),
                           .cos_sin = cos_sin_.data(),
                           .rows = rows.data(),
                           .cache = cache.data()})
            .ok());
  std::vector<Bf16> heads(static_cast<size_t>(m * dims_.num_heads * dims_.v_head_dim));
  CHECK(backend_
            .MlaAttention({.m = m,
                           .dims = dims_,
                           .q = q.data(),
                           .kv_b = layer.kv_b_proj,
                           .softmax_scale = static_cast<float>(config.softmax_scale()),
                           .rows = rows.data(),
                           .cache = cache.data(),
                           .out = heads.data()})
            .ok());
  const std::vector<Bf16> y = Linear(layer.o_proj, heads);
  CHECK(
      backend_.ResidualAdd({.m = m, .dim = config.hidden_size, .h = h.data(), .y = y.data()}).ok());
}

void BatchedForward::Moe(size_t index, const std::vector<Bf16>& x, std::vector<Bf16>& h) {
  const model::MoeLayerWeights& moe = *model_.weights.layers[index].moe;
  const std::vector<model::ExpertShard>& shards = model_.experts[index];
  const GateConfig gate = reference::MakeGateConfig(model_.config);
  const int64_t hidden = model_.config.hidden_size;
  const int64_t m = static_cast<int64_t>(x.size()) / hidden;
  const int64_t top_k = gate.num_experts_per_tok;
  std::vector<float> logits(static_cast<size_t>(m * gate.n_routed_experts));
  CHECK(backend_
            .Linear({.m = m,
                     .weight = moe.gate,
                     .x = x.data(),
                     .x_stride = hidden,
                     .out_f32 = logits.data(),
                     .out_stride = gate.n_routed_experts})
            .ok());
  std::vector<ExpertId> experts(static_cast<size_t>(m * top_k));
  std::vector<float> weights(experts.size());
  const float* bias =
      moe.e_score_correction_bias.empty() ? nullptr : moe.e_score_correction_bias.data();
  CHECK(backend_
            .GateSelect({.m = m,
                         .config = gate,
                         .logits = logits.data(),
                         .bias = bias,
                         .experts = experts.data(),
                         .weights = weights.data()})
            .ok());

  std::vector<ExpertGroup> groups;
  std::vector<int32_t> row_index;
  std::vector<const Bf16*> rows(experts.size());
  std::vector<Bf16> out(experts.size() * hidden);
  for (size_t e = 0; e < shards.size(); ++e) {
    ExpertGroup group{.begin = static_cast<int64_t>(row_index.size())};
    for (size_t slot = 0; slot < experts.size(); ++slot) {
      if (experts[slot].value() != e) continue;
      rows[slot] = &out[row_index.size() * hidden];
      row_index.push_back(static_cast<int32_t>(slot / top_k));
    }
    group.end = static_cast<int64_t>(row_index.size());
    const model::MlpWeights& w = shards[e].weights;
    group.weights = {w.gate_proj, w.up_proj, w.down_proj};
    groups.push_back(group);
  }
  const bool fp8 = shards[0].weights.gate_proj.dtype == DType::kE4m3;
  std::vector<E4m3> codes(x.size());
  std::vector<float> scales(static_cast<size_t>(m * CeilDiv(hidden, kQuantBlock)));
  if (fp8) {
    CHECK(backend_
              .QuantizeRows({.m = m,
                             .dim = hidden,
                             .x = x.data(),
                             .codes = codes.data(),
                             .scales = scales.data(),
                             .power_of_two_scales = model_.config.power_of_two_scales()})
              .ok());
  }
  CHECK(backend_
            .ExpertFfn({.hidden = hidden,
                        .intermediate = shards[0].weights.gate_proj.rows,
                        .groups = groups.data(),
                        .num_groups = static_cast<int64_t>(groups.size()),
                        .m = static_cast<int64_t>(row_index.size()),
                        .x_codes = fp8 ? codes.data() : nullptr,
                        .x_scales = fp8 ? scales.data() : nullptr,
                        .x_bf16 = fp8 ? nullptr : x.data(),
                        .row_index = row_index.data(),
                        .out = out.data(),
                        .power_of_two_scales = model_.config.power_of_two_scales()})
            .ok());
  std::vector<Bf16> routed(x.size());
  CHECK(backend_
            .Combine({.m = m,
                      .dim = hidden,
                      .top_k = static_cast<int32_t>(top_k),
                      .experts_per_group = CombineGroupSize(gate),
                      .experts = experts.data(),
                      .weights = weights.data(),
                      .rows = rows.data(),
                      .out = routed.data()})
            .ok());
  std::vector<Bf16> shared(x.size());
  if (moe.shared_experts) shared = Mlp(*moe.shared_experts, x);
  CHECK(backend_
            .MoeResidual({.m = m,
                          .dim = hidden,
                          .h = h.data(),
                          .routed = routed.data(),
                          .shared = shared.data()})
            .ok());
}

BatchResult BatchedForward::Run(const std::vector<BatchRow>& rows) {
  const model::ModelConfig& config = model_.config;
  const int64_t m = static_cast<int64_t>(rows.size()), hidden = config.hidden_size;
  std::vector<TokenId> ids;
  std::vector<SequenceRow> where;
  for (const BatchRow& row : rows) {
    ids.push_back(row.token);
    where.push_back(row.where);
  }
  std::vector<Bf16> h(static_cast<size_t>(m * hidden));
  CHECK(
      backend_
          .Embed({.m = m, .table = model_.weights.embed_tokens, .ids = ids.data(), .out = h.data()})
          .ok());
  for (int64_t i = 0; i < m; ++i) {
    if (rows[i].poison != 0.0f) {
      std::fill_n(h.begin() + i * hidden, hidden, ToBf16(rows[i].poison));
    }
  }
  for (size_t layer = 0; layer < model_.weights.layers.size(); ++layer) {
    const model::AttentionLayerWeights& weights = model_.weights.layers[layer];
    Attention(layer, h, where);
    const std::vector<Bf16> x =
        Norm(h, hidden, weights.post_attention_layernorm.data(), config.rms_norm_eps);
    if (weights.moe) {
      Moe(layer, x, h);
    } else {
      const std::vector<Bf16> y = Mlp(*weights.mlp, x);
      CHECK(backend_.ResidualAdd({.m = m, .dim = hidden, .h = h.data(), .y = y.data()}).ok());
    }
  }

  BatchResult result;
  result.final_hidden = Norm(h, hidden, model_.weights.norm.data(), config.rms_norm_eps);
  const int64_t vocab = model_.weights.lm_head.rows;
  result.logits.resize(static_cast<size_t>(m * vocab));
  CHECK(backend_
            .Linear({.m = m,
                     .weight = model_.weights.lm_head,
                     .x = result.final_hidden.data(),
                     .x_stride = hidden,
                     .out_f32 = result.logits.data(),
                     .out_stride = vocab})
            .ok());
  const std::vector<SamplingParams> sampling(rows.size());
  const std::vector<uint64_t> index(rows.size());
  std::vector<TokenId> tokens(rows.size());
  std::vector<float> logprobs(rows.size());
  CHECK(backend_
            .Sample({.m = m,
                     .vocab = vocab,
                     .logits_stride = vocab,
                     .logits = result.logits.data(),
                     .params = sampling.data(),
                     .token_index = index.data(),
                     .tokens = tokens.data(),
                     .logprobs = logprobs.data()})
            .ok());
  result.digests.resize(rows.size());
  CHECK(backend_
            .RowDigest({.m = m,
                        .dim = hidden,
                        .hidden = result.final_hidden.data(),
                        .hidden_stride = hidden,
                        .logprobs = logprobs.data(),
                        .digests = result.digests.data()})
            .ok());
  for (int64_t i = 0; i < m; ++i) {
    result.hashes.push_back(HashRow(&result.logits[i * vocab], vocab,
                                    HashRow(&result.final_hidden[i * hidden], hidden)));
  }
  return result;
}

}  // namespace moebius::kernels::cpu
