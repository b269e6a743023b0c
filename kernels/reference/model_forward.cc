#include "kernels/reference/model_forward.h"

#include <algorithm>

#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/reference/attention.h"
#include "kernels/reference/dense.h"
#include "kernels/reference/experts.h"
#include "kernels/reference/gate.h"
#include "kernels/reference/sampling.h"
#include "model/rope.h"

namespace moebius::kernels::reference {
namespace {

void RoundAll(Rounding rounding, absl::Span<float> values) {
  for (float& value : values) value = RoundActivation(value, rounding);
}

void RoundedLinear(const MatrixView& weight, absl::Span<const float> x, Rounding rounding,
                   absl::Span<float> out) {
  LinearRow(weight, x, out);
  RoundAll(rounding, out);
}

ExpertWeights ToExpertWeights(const model::MlpWeights& mlp) {
  return {mlp.gate_proj, mlp.up_proj, mlp.down_proj};
}

// Dense and shared MLPs: gate and up are linear layers of their own, so their outputs are rounded.
void Mlp(const model::MlpWeights& mlp, absl::Span<const float> x, Rounding rounding,
         absl::Span<float> y) {
  std::vector<float> gate(mlp.gate_proj.rows), up(mlp.up_proj.rows);
  RoundedLinear(mlp.gate_proj, x, rounding, absl::MakeSpan(gate));
  RoundedLinear(mlp.up_proj, x, rounding, absl::MakeSpan(up));
  SwiGluRow(gate, up, rounding, absl::MakeSpan(gate));
  RoundedLinear(mlp.down_proj, gate, rounding, y);
}

MlaDims Dims(const model::ModelConfig& config) {
  return {.num_heads = config.num_attention_heads,
          .qk_nope_head_dim = config.qk_nope_head_dim,
          .qk_rope_head_dim = config.qk_rope_head_dim,
          .v_head_dim = config.v_head_dim,
          .kv_lora_rank = config.kv_lora_rank};
}

}  // namespace

GateConfig MakeGateConfig(const model::ModelConfig& config) {
  GateConfig gate;
  gate.n_routed_experts = static_cast<int32_t>(config.n_routed_experts);
  gate.num_experts_per_tok = static_cast<int32_t>(config.num_experts_per_tok);
  gate.n_group = static_cast<int32_t>(config.n_group);
  gate.topk_group = static_cast<int32_t>(config.topk_group);
  gate.scoring_func = config.scoring_func == model::ScoringFunc::kSigmoid ? ScoringFunc::kSigmoid
                                                                          : ScoringFunc::kSoftmax;
  switch (config.topk_method) {
    case model::TopkMethod::kGreedy:
      gate.topk_method = TopkMethod::kGreedy;
      break;
    case model::TopkMethod::kGroupLimitedGreedy:
      gate.topk_method = TopkMethod::kGroupLimitedGreedy;
      break;
    case model::TopkMethod::kNoauxTc:
      gate.topk_method = TopkMethod::kNoauxTc;
      break;
  }
  gate.norm_topk_prob = config.norm_topk_prob;
  gate.routed_scaling_factor = static_cast<float>(config.routed_scaling_factor);
  return gate;
}

absl::StatusOr<std::unique_ptr<ModelForward>> ModelForward::Load(const std::string& dir) {
  std::unique_ptr<ModelForward> model(new ModelForward());
  ASSIGN_OR_RETURN(model->config, model::LoadConfig(dir));
  ASSIGN_OR_RETURN(model->checkpoint_, model::Checkpoint::Open(dir));
  ASSIGN_OR_RETURN(model->weights,
                   model::LoadAttentionWorkerWeights(*model->checkpoint_, model->config));
  model->experts.resize(static_cast<size_t>(model->config.total_layers()));
  for (const LayerId layer : model::MoeLayers(*model->checkpoint_, model->config)) {
    for (int64_t e = 0; e < model->config.n_routed_experts; ++e) {
      ASSIGN_OR_RETURN(model::ExpertShard shard,
                       model::LoadExpertShard(*model->checkpoint_, model->config, layer,
                                              ExpertId(static_cast<uint32_t>(e))));
      model->experts[layer.value()].push_back(std::move(shard));
    }
  }
  return model;
}

Rows ModelForward::EmbedTokens(absl::Span<const TokenId> ids) const {
  Rows h(static_cast<int64_t>(ids.size()), config.hidden_size);
  for (int64_t t = 0; t < h.count; ++t) {
    CHECK(ids[t] >= 0 && ids[t] < weights.embed_tokens.rows);
    for (int64_t d = 0; d < h.dim; ++d) h[t][d] = WeightAt(weights.embed_tokens, ids[t], d);
  }
  return h;
}

Rows ModelForward::Attention(const model::AttentionLayerWeights& layer, const Rows& x,
                             Rounding rounding, Rows* latents) const {
  const MlaDims dims = Dims(config);
  const int64_t rope = dims.qk_rope_head_dim;
  const float norm_eps = static_cast<float>(model::ModelConfig::kLatentNormEps);
  const std::vector<float> cos_sin = model::RopeCosSinTable(config, x.count);
  const std::vector<float> kv_b = ExpandKvB(layer.kv_b_proj, rounding);

  Rows q(x.count, dims.num_heads * dims.q_head_dim());
  Rows cache(x.count, dims.latent_dim());
  std::vector<float> kv(static_cast<size_t>(dims.latent_dim()));
  for (int64_t t = 0; t < x.count; ++t) {
    if (layer.q_proj.empty()) {
      std::vector<float> cq(layer.q_a_proj.rows);
      RoundedLinear(layer.q_a_proj, x[t], rounding, absl::MakeSpan(cq));
      RmsNormRow(cq, layer.q_a_layernorm, norm_eps, rounding, absl::MakeSpan(cq));
      RoundedLinear(layer.q_b_proj, cq, rounding, q[t]);
    } else {
      RoundedLinear(layer.q_proj, x[t], rounding, q[t]);
    }
    const auto angles = absl::MakeConstSpan(cos_sin.data() + t * rope, rope);
    for (int64_t h = 0; h < dims.num_heads; ++h) {
      RotateRow(angles, rounding,
                q[t].subspan(h * dims.q_head_dim() + dims.qk_nope_head_dim, rope));
    }
    RoundedLinear(layer.kv_a_proj_with_mqa, x[t], rounding, absl::MakeSpan(kv));
    LatentRow(dims, kv, layer.kv_a_layernorm, norm_eps, angles, rounding, cache[t]);
  }

  Rows y(x.count, config.hidden_size);
  std::vector<float> heads(static_cast<size_t>(dims.num_heads * dims.v_head_dim));
  std::vector<const float*> keys;
  for (int64_t t = 0; t < x.count; ++t) {
    keys.push_back(cache[t].data());
    MlaAttentionRow(dims, q[t], kv_b, static_cast<float>(config.softmax_scale()), keys, rounding,
                    absl::MakeSpan(heads));
    RoundedLinear(layer.o_proj, heads, rounding, y[t]);
  }
  if (latents != nullptr) *latents = std::move(cache);
  return y;
}

void ModelForward::Moe(const model::AttentionLayerWeights& layer, absl::Span<const float> x,
                       Rounding rounding, absl::Span<float> y) const {
  const GateConfig gate = MakeGateConfig(config);
  std::vector<float> logits(static_cast<size_t>(gate.n_routed_experts));
  LinearRow(layer.moe->gate, x, absl::MakeSpan(logits));
  std::vector<ExpertId> chosen(static_cast<size_t>(gate.num_experts_per_tok));
  std::vector<float> chosen_weights(chosen.size());
  GateSelectRow(gate, logits, layer.moe->e_score_correction_bias, absl::MakeSpan(chosen),
                absl::MakeSpan(chosen_weights));

  const bool quantize =
      rounding != Rounding::kFloat32 && config.wire_dtype() == model::WireDtype::kE4m3;
  std::vector<E4m3> codes(x.size());
  std::vector<float> scales(CeilDiv(static_cast<int64_t>(x.size()), kQuantBlock));
  const bool power_of_two_scales = config.power_of_two_scales();
  if (quantize) {
    QuantizeRow(x, power_of_two_scales, absl::MakeSpan(codes), absl::MakeSpan(scales));
  }

  Rows rows(static_cast<int64_t>(chosen.size()), static_cast<int64_t>(x.size()));
  std::vector<const float*> row_pointers;
  for (size_t j = 0; j < chosen.size(); ++j) {
    const int64_t row = static_cast<int64_t>(j);
    const ExpertWeights expert =
        ToExpertWeights(experts[layer.layer.value()][chosen[j].value()].weights);
    if (quantize) {
      ExpertFfnQuantizedRow(expert, codes, scales, power_of_two_scales, rounding, rows[row]);
    } else {
      ExpertFfnRow(expert, x, rounding, rows[row]);
    }
    row_pointers.push_back(rows[row].data());
  }
  CombineRow(chosen, chosen_weights, row_pointers, CombineGroupSize(gate), rounding, y);

  if (layer.moe->shared_experts.has_value()) {
    std::vector<float> shared(x.size());
    Mlp(*layer.moe->shared_experts, x, rounding, absl::MakeSpan(shared));
    ResidualAddRow(shared, rounding, y);
  }
}

void ModelForward::Layer(const model::AttentionLayerWeights& layer, Rounding rounding, Rows& h,
                         Rows* latents) const {
  const float eps = static_cast<float>(config.rms_norm_eps);
  Rows x(h.count, h.dim);
  for (int64_t t = 0; t < h.count; ++t) {
    RmsNormRow(h[t], layer.input_layernorm, eps, rounding, x[t]);
  }
  const Rows attention = Attention(layer, x, rounding, latents);
  std::vector<float> y(static_cast<size_t>(h.dim));
  for (int64_t t = 0; t < h.count; ++t) {
    ResidualAddRow(attention[t], rounding, h[t]);
    RmsNormRow(h[t], layer.post_attention_layernorm, eps, rounding, x[t]);
    if (layer.moe.has_value()) {
      Moe(layer, x[t], rounding, absl::MakeSpan(y));
    } else {
      Mlp(*layer.mlp, x[t], rounding, absl::MakeSpan(y));
    }
    ResidualAddRow(y, rounding, h[t]);
  }
}

ForwardResult ModelForward::Forward(absl::Span<const TokenId> ids, Rounding rounding) const {
  ForwardResult result;
  Rows h = EmbedTokens(ids);
  result.hidden_states.push_back(h);
  result.latents.resize(weights.layers.size());
  for (size_t layer = 0; layer < weights.layers.size(); ++layer) {
    Layer(weights.layers[layer], rounding, h, &result.latents[layer]);
    result.hidden_states.push_back(h);
  }
  result.final_hidden = Rows(h.count, h.dim);
  result.logits = Rows(h.count, weights.lm_head.rows);
  for (int64_t t = 0; t < h.count; ++t) {
    RmsNormRow(h[t], weights.norm, static_cast<float>(config.rms_norm_eps), rounding,
               result.final_hidden[t]);
    LinearRow(weights.lm_head, result.final_hidden[t], result.logits[t]);
  }
  return result;
}

MtpResult ModelForward::Mtp(absl::Span<const TokenId> ids, const Rows& final_hidden,
                            Rounding rounding) const {
  CHECK(!weights.mtp.empty());
  CHECK_GE(ids.size(), 2u);
  CHECK_EQ(final_hidden.count, static_cast<int64_t>(ids.size()));
  const model::MtpLayerWeights& mtp = weights.mtp.front();
  const float eps = static_cast<float>(config.rms_norm_eps);
  const size_t hidden = static_cast<size_t>(config.hidden_size);

  const Rows embedding = EmbedTokens(ids.subspan(1));
  Rows z(embedding.count, config.hidden_size);
  std::vector<float> concat(2 * hidden);  // [embedding ; hidden]
  for (int64_t i = 0; i < z.count; ++i) {
    const absl::Span<float> both = absl::MakeSpan(concat);
    RmsNormRow(embedding[i], mtp.enorm, eps, rounding, both.first(hidden));
    RmsNormRow(final_hidden[i], mtp.hnorm, eps, rounding, both.subspan(hidden));
    RoundedLinear(mtp.eh_proj, concat, rounding, z[i]);
  }
  Layer(mtp.layer, rounding, z, nullptr);

  MtpResult result{Rows(z.count, z.dim), Rows(z.count, weights.lm_head.rows)};
  for (int64_t i = 0; i < z.count; ++i) {
    RmsNormRow(z[i], mtp.shared_head_norm, eps, rounding, result.hidden[i]);
    LinearRow(weights.lm_head, result.hidden[i], result.logits[i]);
  }
  return result;
}

std::vector<TokenId> ModelForward::Greedy(absl::Span<const TokenId> prompt, int64_t count,
                                          Rounding rounding) const {
  std::vector<TokenId> ids(prompt.begin(), prompt.end());
  for (int64_t i = 0; i < count; ++i) {
    const ForwardResult result = Forward(ids, rounding);
    ids.push_back(SampleRow(result.logits[result.logits.count - 1], SamplingParams{}, ids.size()));
  }
  return {ids.begin() + static_cast<int64_t>(prompt.size()), ids.end()};
}

std::vector<float> NextLogProbs(const Rows& logits, absl::Span<const TokenId> ids, int64_t shift) {
  std::vector<float> out;
  for (int64_t i = 0; i + shift < static_cast<int64_t>(ids.size()); ++i) {
    out.push_back(LogProbAt(logits[i], ids[i + shift]));
  }
  return out;
}

}  // namespace moebius::kernels::reference
