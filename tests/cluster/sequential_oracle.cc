#include "tests/cluster/sequential_oracle.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "model/rope.h"

namespace moebius::cluster_test {

SequentialOracle::SequentialOracle(const ToyModel* model, kernels::Backend* backend)
    : model_(*model),
      config_(model->config()),
      backend_(*backend),
      dims_{config_.num_attention_heads, config_.qk_nope_head_dim, config_.qk_rope_head_dim,
            config_.v_head_dim, config_.kv_lora_rank},
      cos_sin_(model::RopeCosSinTable(config_, config_.max_position_embeddings)),
      h_(config_.hidden_size) {
  const int64_t blocks = CeilDiv(config_.max_position_embeddings, kernels::kCacheBlockTokens);
  block_table_.resize(blocks);
  std::iota(block_table_.begin(), block_table_.end(), 0);
  caches_.assign(config_.num_hidden_layers,
                 std::vector<Bf16>(blocks * kernels::kCacheBlockTokens * dims_.latent_dim()));
}

std::vector<OracleToken> SequentialOracle::Generate(const OracleRequest& request) {
  CHECK(!request.prompt.empty());
  std::vector<TokenId> tokens = request.prompt;
  std::vector<OracleToken> out;
  std::vector<float> logits(config_.vocab_size);
  for (int64_t t = 0; out.size() < request.max_tokens; ++t) {
    Position(tokens[t], t);
    if (t + 1 < static_cast<int64_t>(tokens.size())) continue;
    CHECK(backend_
              .Linear({.m = 1,
                       .weight = model_.weights().lm_head,
                       .x = final_.data(),
                       .x_stride = config_.hidden_size,
                       .out_f32 = logits.data(),
                       .out_stride = config_.vocab_size})
              .ok());
    OracleToken token;
    const uint64_t index = tokens.size();
    CHECK(backend_
              .Sample({.m = 1,
                       .vocab = config_.vocab_size,
                       .logits_stride = config_.vocab_size,
                       .logits = logits.data(),
                       .params = &request.sampling,
                       .token_index = &index,
                       .tokens = &token.token,
                       .logprobs = &token.logprob})
              .ok());
    CHECK(backend_
              .RowDigest({.m = 1,
                          .dim = config_.hidden_size,
                          .hidden = final_.data(),
                          .hidden_stride = config_.hidden_size,
                          .logprobs = &token.logprob,
                          .digests = &token.row_digest})
              .ok());
    tokens.push_back(token.token);
    out.push_back(token);
    if (std::find(request.eos_token_ids.begin(), request.eos_token_ids.end(), token.token) !=
        request.eos_token_ids.end()) {
      break;
    }
    if (static_cast<int64_t>(tokens.size()) == config_.max_position_embeddings) break;
  }
  return out;
}

void SequentialOracle::Position(TokenId token, int64_t position) {
  const int64_t hidden = config_.hidden_size;
  CHECK(
      backend_
          .Embed({.m = 1, .table = model_.weights().embed_tokens, .ids = &token, .out = h_.data()})
          .ok());
  for (int64_t l = 0; l < config_.num_hidden_layers; ++l) {
    const model::AttentionLayerWeights& layer = model_.weights().layers[l];
    Attention(l, position);
    const std::vector<Bf16> x = Norm(h_, layer.post_attention_layernorm, config_.rms_norm_eps);
    std::vector<Bf16> y(hidden);
    if (layer.mlp) {
      Mlp(*layer.mlp, x, y);
      CHECK(backend_.ResidualAdd({.m = 1, .dim = hidden, .h = h_.data(), .y = y.data()}).ok());
    } else {
      std::vector<Bf16> routed(hidden);
      RoutedSum(l, x.data(), routed.data());
      Mlp(*layer.moe->shared_experts, x, y);
      CHECK(backend_
                .MoeResidual({.m = 1,
                              .dim = hidden,
                              .h = h_.data(),
                              .routed = routed.data(),
                              .shared = y.data()})
                .ok());
    }
  }
  final_ = Norm(h_, model_.weights().norm, config_.rms_norm_eps);
}

void SequentialOracle::Attention(int64_t l, int64_t position) {
  const model::AttentionLayerWeights& layer = model_.weights().layers[l];
  const std::vector<Bf16> x = Norm(h_, layer.input_layernorm, config_.rms_norm_eps);
  std::vector<Bf16> q;
  if (config_.q_lora_rank) {
    q = Linear(layer.q_b_proj, Norm(Linear(layer.q_a_proj, x), layer.q_a_layernorm, 1e-6));
  } else {
    q = Linear(layer.q_proj, x);
  }
  const std::vector<Bf16> kv = Linear(layer.kv_a_proj_with_mqa, x);
  const kernels::SequenceRow row{static_cast<int32_t>(position), block_table_.data()};
  CHECK(backend_
            .RopeAndCache({.m = 1,
                           .dims = dims_,
                           .q = q.data(),
                           .kv = kv.data(),
                           .kv_stride = dims_.latent_dim(),
                           .kv_norm = layer.kv_a_layernorm.data(),
                           .kv_norm_eps = 1e-6f,
                           .cos_sin = cos_sin_.data(),
                           .rows = &row,
                           .cache = caches_[l].data()})
            .ok());
  std::vector<Bf16> heads(dims_.num_heads * dims_.v_head_dim);
  CHECK(backend_
            .MlaAttention({.m = 1,
                           .dims = dims_,
                           .q = q.data(),
                           .kv_b = layer.kv_b_proj,
                           .softmax_scale = static_cast<float>(config_.softmax_scale()),
                           .rows = &row,
                           .cache = caches_[l].data(),
                           .out = heads.data()})
            .ok());
  const std::vector<Bf16> y = Linear(layer.o_proj, heads);
  CHECK(backend_.ResidualAdd({.m = 1, .dim = config_.hidden_size, .h = h_.data(), .y = y.data()})
            .ok());
}

void SequentialOracle::RoutedSum(int64_t layer, const Bf16* x, Bf16* out) {
  const int64_t hidden = config_.hidden_size;
  const model::MoeLayerWeights& gate = model_.gate(layer);
  const int64_t top_k = config_.num_experts_per_tok;
  std::vector<float> logits(config_.n_routed_experts);
  CHECK(backend_
            .Linear({.m = 1,
                     .weight = gate.gate,
                     .x = x,
                     .x_stride = hidden,
                     .out_f32 = logits.data(),
                     .out_stride = config_.n_routed_experts})
            .ok());
  std::vector<ExpertId> experts(top_k);
  std::vector<float> weights(top_k);
  CHECK(backend_
            .GateSelect({.m = 1,
                         .config = model_.gate_config(),
                         .logits = logits.data(),
                         .bias = gate.e_score_correction_bias.data(),
                         .experts = experts.data(),
                         .weights = weights.data()})
            .ok());
  std::vector<E4m3> codes(hidden);
  std::vector<float> scales(CeilDiv(hidden, kQuantBlock));
  const bool fp8 = config_.wire_dtype() == model::WireDtype::kE4m3;
  if (fp8) {
    CHECK(backend_
              .QuantizeRows({.m = 1,
                             .dim = hidden,
                             .x = x,
                             .codes = codes.data(),
                             .scales = scales.data(),
                             .power_of_two_scales = config_.power_of_two_scales()})
              .ok());
  }
  std::vector<std::vector<Bf16>> rows(top_k, std::vector<Bf16>(hidden));
  std::vector<const Bf16*> row_pointers;
  for (int64_t k = 0; k < top_k; ++k) {
    const model::MlpWeights& mlp = model_.expert(layer, experts[k].value());
    const kernels::ExpertGroup group{0, 1, {mlp.gate_proj, mlp.up_proj, mlp.down_proj}};
    CHECK(backend_
              .ExpertFfn({.hidden = hidden,
                          .intermediate = config_.moe_intermediate_size,
                          .groups = &group,
                          .num_groups = 1,
                          .m = 1,
                          .x_codes = fp8 ? codes.data() : nullptr,
                          .x_scales = fp8 ? scales.data() : nullptr,
                          .x_bf16 = fp8 ? nullptr : x,
                          .out = rows[k].data(),
                          .power_of_two_scales = config_.power_of_two_scales()})
              .ok());
    row_pointers.push_back(rows[k].data());
  }
  CHECK(backend_
            .Combine({.m = 1,
                      .dim = hidden,
                      .top_k = static_cast<int32_t>(top_k),
                      .experts_per_group = kernels::CombineGroupSize(model_.gate_config()),
                      .experts = experts.data(),
                      .weights = weights.data(),
                      .rows = row_pointers.data(),
                      .out = out})
            .ok());
}

void SequentialOracle::Mlp(const model::MlpWeights& mlp, const std::vector<Bf16>& x,
                           std::vector<Bf16>& out) {
  const std::vector<Bf16> gate = Linear(mlp.gate_proj, x);
  const std::vector<Bf16> up = Linear(mlp.up_proj, x);
  std::vector<Bf16> product(gate.size());
  CHECK(backend_
            .SwiGlu({.m = 1,
                     .dim = static_cast<int64_t>(gate.size()),
                     .gate = gate.data(),
                     .up = up.data(),
                     .out = product.data()})
            .ok());
  out = Linear(mlp.down_proj, product);
}

std::vector<Bf16> SequentialOracle::Linear(const MatrixView& weight, const std::vector<Bf16>& x) {
  std::vector<Bf16> out(weight.rows);
  CHECK(backend_
            .Linear({.m = 1,
                     .weight = weight,
                     .x = x.data(),
                     .x_stride = weight.cols,
                     .out_bf16 = out.data(),
                     .out_stride = weight.rows})
            .ok());
  return out;
}

std::vector<Bf16> SequentialOracle::Norm(const std::vector<Bf16>& x, absl::Span<const float> weight,
                                         double eps) {
  const auto dim = static_cast<int64_t>(x.size());
  std::vector<Bf16> out(x.size());
  CHECK(backend_
            .RmsNorm({.m = 1,
                      .dim = dim,
                      .x = x.data(),
                      .x_stride = dim,
                      .weight = weight.data(),
                      .eps = static_cast<float>(eps),
                      .out = out.data(),
                      .out_stride = dim})
            .ok());
  return out;
}

}  // namespace moebius::cluster_test
