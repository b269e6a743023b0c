#include "attention_worker/layer_compute.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "attention_worker/most_likely_tokens.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "model/rope.h"

namespace moebius::attention_worker {
namespace {

kernels::MlaDims DimsOf(const model::ModelConfig& config) {
  kernels::MlaDims dims;
  dims.num_heads = config.num_attention_heads;
  dims.qk_nope_head_dim = config.qk_nope_head_dim;
  dims.qk_rope_head_dim = config.qk_rope_head_dim;
  dims.v_head_dim = config.v_head_dim;
  dims.kv_lora_rank = config.kv_lora_rank;
  return dims;
}

// Rows of gate_proj in the widest MLP that this worker computes.
int64_t WidestMlp(const model::AttentionWorkerWeights& weights) {
  int64_t widest = 0;
  for (const model::AttentionLayerWeights& layer : weights.layers) {
    if (layer.mlp) widest = std::max(widest, layer.mlp->gate_proj.rows);
    if (layer.moe && layer.moe->shared_experts) {
      widest = std::max(widest, layer.moe->shared_experts->gate_proj.rows);
    }
  }
  return widest;
}

}  // namespace

LayerCompute::LayerCompute(const AttentionModel& model, const AttentionOptions& options,
                           int64_t max_positions, KvBlockPool* cache)
    : config_(*model.config),
      weights_(*model.weights),
      backend_(*model.backend),
      cache_(*cache),
      dims_(DimsOf(config_)),
      softmax_scale_(static_cast<float>(config_.softmax_scale())),
      head_slice_rows_(options.head_slice_rows),
      sampled_vocab_(options.sampled_vocab > 0 ? options.sampled_vocab : config_.vocab_size),
      cos_sin_(model::RopeCosSinTable(config_, max_positions)) {
  CHECK_EQ(static_cast<int64_t>(weights_.layers.size()), config_.num_hidden_layers);
  const size_t rows = static_cast<size_t>(options.max_step_tokens);
  const int64_t hidden = config_.hidden_size;
  h_.resize(rows * hidden);
  x_.resize(rows * hidden);
  q_latent_.resize(rows * config_.q_lora_rank.value_or(0));
  q_.resize(rows * dims_.num_heads * dims_.q_head_dim());
  kv_.resize(rows * dims_.latent_dim());
  heads_.resize(rows * dims_.num_heads * dims_.v_head_dim);
  const int64_t widest = WidestMlp(weights_);
  gate_.resize(rows * widest);
  up_.resize(rows * widest);
  y_.resize(rows * hidden);
  head_x_.resize(static_cast<size_t>(head_slice_rows_) * hidden);
  logits_.resize(static_cast<size_t>(head_slice_rows_) * config_.vocab_size);
}

void LayerCompute::Begin(StepBatch* batch) {
  batch_ = batch;
  layer_ = 0;
  at_experts_ = false;
  routed_ = nullptr;
}

void LayerCompute::SetRouted(const Bf16* routed) {
  CHECK(at_experts_);
  routed_ = routed;
}

absl::Status LayerCompute::RunLayers() {
  const int64_t m = batch_->m;
  const int64_t hidden = config_.hidden_size;
  if (at_experts_) {
    CHECK(routed_ != nullptr);
    RETURN_IF_ERROR(backend_.MoeResidual(
        {.m = m, .dim = hidden, .h = h_.data(), .routed = routed_, .shared = y_.data()}));
    at_experts_ = false;
    routed_ = nullptr;
    ++layer_;
  } else {
    RETURN_IF_ERROR(backend_.Embed(
        {.m = m, .table = weights_.embed_tokens, .ids = batch_->ids.data(), .out = h_.data()}));
  }
  for (; layer_ < config_.num_hidden_layers; ++layer_) {
    const model::AttentionLayerWeights& layer = weights_.layers[layer_];
    RETURN_IF_ERROR(Attention(layer_));
    RETURN_IF_ERROR(Norm(m, hidden, h_.data(), hidden, layer.post_attention_layernorm.data(),
                         config_.rms_norm_eps, x_.data()));
    if (layer.moe) {
      at_experts_ = true;
      return absl::OkStatus();
    }
    RETURN_IF_ERROR(Mlp(*layer.mlp));
    RETURN_IF_ERROR(backend_.ResidualAdd({.m = m, .dim = hidden, .h = h_.data(), .y = y_.data()}));
  }
  return Head();
}

absl::Status LayerCompute::RunShared() {
  const model::MoeLayerWeights& moe = *weights_.layers[layer_].moe;
  if (moe.shared_experts) return Mlp(*moe.shared_experts);
  // A model without shared experts adds nothing to the routed sum.
  std::fill_n(y_.data(), batch_->m * config_.hidden_size, Bf16{});
  return absl::OkStatus();
}

// h += o_proj(MLA(RMSNorm(h))), DeepSeek-V3 report section 2.1.1.
absl::Status LayerCompute::Attention(int64_t index) {
  const model::AttentionLayerWeights& layer = weights_.layers[index];
  const int64_t m = batch_->m;
  const int64_t hidden = config_.hidden_size;
  RETURN_IF_ERROR(Norm(m, hidden, h_.data(), hidden, layer.input_layernorm.data(),
                       config_.rms_norm_eps, x_.data()));
  if (config_.q_lora_rank) {
    const int64_t rank = *config_.q_lora_rank;
    RETURN_IF_ERROR(Linear(m, layer.q_a_proj, x_.data(), hidden, q_latent_.data()));
    RETURN_IF_ERROR(Norm(m, rank, q_latent_.data(), rank, layer.q_a_layernorm.data(),
                         model::ModelConfig::kLatentNormEps, q_latent_.data()));
    RETURN_IF_ERROR(Linear(m, layer.q_b_proj, q_latent_.data(), rank, q_.data()));
  } else {
    RETURN_IF_ERROR(Linear(m, layer.q_proj, x_.data(), hidden, q_.data()));
  }
  RETURN_IF_ERROR(Linear(m, layer.kv_a_proj_with_mqa, x_.data(), hidden, kv_.data()));
  RETURN_IF_ERROR(
      backend_.RopeAndCache({.m = m,
                             .dims = dims_,
                             .q = q_.data(),
                             .kv = kv_.data(),
                             .kv_stride = dims_.latent_dim(),
                             .kv_norm = layer.kv_a_layernorm.data(),
                             .kv_norm_eps = static_cast<float>(model::ModelConfig::kLatentNormEps),
                             .cos_sin = cos_sin_.data(),
                             .rows = batch_->rows.data(),
                             .cache = cache_.LayerCache(index)}));
  RETURN_IF_ERROR(backend_.MlaAttention({.m = m,
                                         .dims = dims_,
                                         .q = q_.data(),
                                         .kv_b = layer.kv_b_proj,
                                         .softmax_scale = softmax_scale_,
                                         .rows = batch_->rows.data(),
                                         .cache = cache_.LayerCache(index),
                                         .out = heads_.data()}));
  RETURN_IF_ERROR(
      Linear(m, layer.o_proj, heads_.data(), dims_.num_heads * dims_.v_head_dim, y_.data()));
  return backend_.ResidualAdd({.m = m, .dim = hidden, .h = h_.data(), .y = y_.data()});
}

absl::Status LayerCompute::Mlp(const model::MlpWeights& mlp) {
  const int64_t m = batch_->m;
  const int64_t intermediate = mlp.gate_proj.rows;
  RETURN_IF_ERROR(Linear(m, mlp.gate_proj, x_.data(), config_.hidden_size, gate_.data()));
  RETURN_IF_ERROR(Linear(m, mlp.up_proj, x_.data(), config_.hidden_size, up_.data()));
  RETURN_IF_ERROR(backend_.SwiGlu(
      {.m = m, .dim = intermediate, .gate = gate_.data(), .up = up_.data(), .out = gate_.data()}));
  return Linear(m, mlp.down_proj, gate_.data(), intermediate, y_.data());
}

// Logits are [rows, vocab] in float32, half a megabyte a row for V3: they exist only for the rows
// that need them, a bounded slice at a time.
absl::Status LayerCompute::Head() {
  for (int32_t begin = 0; begin < batch_->heads; begin += head_slice_rows_) {
    RETURN_IF_ERROR(HeadSlice(begin, std::min(head_slice_rows_, batch_->heads - begin)));
  }
  return absl::OkStatus();
}

absl::Status LayerCompute::HeadSlice(int32_t begin, int32_t count) {
  const int64_t hidden = config_.hidden_size;
  for (int32_t i = 0; i < count; ++i) {
    std::memcpy(&head_x_[i * hidden], &h_[batch_->head[begin + i].row * hidden],
                hidden * sizeof(Bf16));
  }
  RETURN_IF_ERROR(Norm(count, hidden, head_x_.data(), hidden, weights_.norm.data(),
                       config_.rms_norm_eps, head_x_.data()));
  RETURN_IF_ERROR(backend_.Linear({.m = count,
                                   .weight = weights_.lm_head,
                                   .x = head_x_.data(),
                                   .x_stride = hidden,
                                   .out_f32 = logits_.data(),
                                   .out_stride = config_.vocab_size}));
  RETURN_IF_ERROR(backend_.Sample({.m = count,
                                   .vocab = sampled_vocab_,
                                   .logits_stride = config_.vocab_size,
                                   .logits = logits_.data(),
                                   .params = &batch_->sampling[begin],
                                   .token_index = &batch_->token_index[begin],
                                   .tokens = &batch_->tokens[begin],
                                   .logprobs = &batch_->logprobs[begin]}));
  RETURN_IF_ERROR(ScoreSlice(begin, count));
  return backend_.RowDigest({.m = count,
                             .dim = hidden,
                             .hidden = head_x_.data(),
                             .hidden_stride = hidden,
                             .logprobs = &batch_->logprobs[begin],
                             .digests = &batch_->digests[begin]});
}

absl::Status LayerCompute::ScoreSlice(int32_t begin, int32_t count) {
  const auto is_score = [](const HeadRow& head) { return head.is_score; };
  const auto first = batch_->head.begin() + begin;
  if (std::none_of(first, first + count, is_score)) return absl::OkStatus();
  const size_t per_row = 1 + batch_->max_top_n;
  for (int32_t i = begin; i < begin + count; ++i) {
    const HeadRow& head = batch_->head[i];
    TokenId* ids = &batch_->score_ids[i * per_row];
    std::fill_n(ids, per_row, -1);
    ids[0] = head.scored_token;
    MostLikelyTokens(&logits_[(i - begin) * config_.vocab_size], sampled_vocab_, head.top_n,
                     ids + 1);
  }
  RETURN_IF_ERROR(backend_.TokenLogprobs({.m = count,
                                          .vocab = sampled_vocab_,
                                          .logits_stride = config_.vocab_size,
                                          .logits = logits_.data(),
                                          .per_row = static_cast<int64_t>(per_row),
                                          .tokens = &batch_->score_ids[begin * per_row],
                                          .logprobs = &batch_->score_logprobs[begin * per_row]}));
  for (int32_t i = begin; i < begin + count; ++i) {
    if (batch_->head[i].is_score) batch_->logprobs[i] = batch_->score_logprobs[i * per_row];
  }
  return absl::OkStatus();
}

absl::Status LayerCompute::Norm(int64_t m, int64_t dim, const Bf16* x, int64_t x_stride,
                                const float* weight, double eps, Bf16* out) {
  return backend_.RmsNorm({.m = m,
                           .dim = dim,
                           .x = x,
                           .x_stride = x_stride,
                           .weight = weight,
                           .eps = static_cast<float>(eps),
                           .out = out,
                           .out_stride = dim});
}

absl::Status LayerCompute::Linear(int64_t m, const MatrixView& weight, const Bf16* x,
                                  int64_t x_stride, Bf16* out) {
  return backend_.Linear({.m = m,
                          .weight = weight,
                          .x = x,
                          .x_stride = x_stride,
                          .out_bf16 = out,
                          .out_stride = weight.rows});
}

}  // namespace moebius::attention_worker
