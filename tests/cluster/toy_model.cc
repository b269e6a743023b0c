#include "tests/cluster/toy_model.h"

#include <algorithm>
#include <cmath>

#include "base/float_formats.h"
#include "base/prng.h"

namespace moebius::cluster_test {

ToyModel::ToyModel(const ToyModelOptions& options) : seed_(options.seed) {
  model::ModelConfig& c = config_;
  c.model_type = model::ModelType::kDeepseekV3;
  c.vocab_size = options.vocab;
  c.hidden_size = options.hidden;
  c.num_hidden_layers = options.layers;
  c.max_position_embeddings = options.max_positions;
  c.num_attention_heads = 2;
  if (options.q_lora) c.q_lora_rank = 24;
  c.kv_lora_rank = 32;
  c.qk_nope_head_dim = 16;
  c.qk_rope_head_dim = 8;
  c.v_head_dim = 16;
  c.rope_scaling = model::YarnScaling{
      .factor = 8, .original_max_position_embeddings = 64, .mscale = 1, .mscale_all_dim = 1};
  c.intermediate_size = 80;
  c.moe_intermediate_size = 32;
  c.n_routed_experts = options.experts;
  c.n_shared_experts = 1;
  c.num_experts_per_tok = options.top_k;
  c.first_k_dense_replace = options.first_dense;
  c.n_group = options.groups;
  c.topk_group = options.topk_group;
  c.norm_topk_prob = true;
  c.routed_scaling_factor = 2.5;
  c.eos_token_id = {1};
  if (options.fp8) c.quantization = model::Fp8Quantization{options.power_of_two_scales};

  const bool fp8 = options.fp8;
  const int64_t hidden = c.hidden_size;
  weights_.embed_tokens = Matrix(c.vocab_size, hidden, false, std::sqrt(float(hidden)));
  experts_.resize(c.num_hidden_layers * c.n_routed_experts);
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) {
    model::AttentionLayerWeights layer;
    layer.layer = LayerId(static_cast<uint32_t>(l));
    layer.input_layernorm = Vector(hidden, 1.0f, 0.2f);
    layer.post_attention_layernorm = Vector(hidden, 1.0f, 0.2f);
    const int64_t q_rows = c.num_attention_heads * c.qk_head_dim();
    if (c.q_lora_rank) {
      layer.q_a_proj = Matrix(*c.q_lora_rank, hidden, fp8, 1);
      layer.q_a_layernorm = Vector(*c.q_lora_rank, 1.0f, 0.2f);
      layer.q_b_proj = Matrix(q_rows, *c.q_lora_rank, fp8, 1);
    } else {
      layer.q_proj = Matrix(q_rows, hidden, fp8, 1);
    }
    layer.kv_a_proj_with_mqa = Matrix(c.latent_dim(), hidden, fp8, 1);
    layer.kv_a_layernorm = Vector(c.kv_lora_rank, 1.0f, 0.2f);
    layer.kv_b_proj = Matrix(c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim),
                             c.kv_lora_rank, fp8, 1.5f);
    layer.o_proj = Matrix(hidden, c.num_attention_heads * c.v_head_dim, fp8, 1.5f);
    if (c.is_moe_layer(l)) {
      model::MoeLayerWeights moe;
      moe.gate = Matrix(c.n_routed_experts, hidden, false, 1);
      moe.e_score_correction_bias = Vector(c.n_routed_experts, 0.0f, 0.1f);
      moe.shared_experts = Mlp(c.shared_intermediate_size(), 1.5f);
      layer.moe = moe;
      for (int64_t e = 0; e < c.n_routed_experts; ++e) {
        experts_[l * c.n_routed_experts + e] = Mlp(c.moe_intermediate_size, 1.5f);
      }
    } else {
      layer.mlp = Mlp(c.intermediate_size, 1.5f);
    }
    weights_.layers.push_back(layer);
  }
  weights_.norm = Vector(hidden, 1.0f, 0.2f);
  weights_.lm_head = Matrix(c.vocab_size, hidden, false, 2.0f);
}

kernels::GateConfig ToyModel::gate_config() const {
  kernels::GateConfig gate;
  gate.n_routed_experts = static_cast<int32_t>(config_.n_routed_experts);
  gate.num_experts_per_tok = static_cast<int32_t>(config_.num_experts_per_tok);
  gate.n_group = static_cast<int32_t>(config_.n_group);
  gate.topk_group = static_cast<int32_t>(config_.topk_group);
  gate.scoring_func = kernels::ScoringFunc::kSigmoid;
  gate.topk_method = kernels::TopkMethod::kNoauxTc;
  gate.norm_topk_prob = config_.norm_topk_prob;
  gate.routed_scaling_factor = static_cast<float>(config_.routed_scaling_factor);
  return gate;
}

// Uniform values whose products with a unit-variance row have standard deviation `gain`.
MatrixView ToyModel::Matrix(int64_t rows, int64_t cols, bool fp8, float gain) {
  MatrixView view;
  view.rows = rows;
  view.cols = cols;
  view.dtype = fp8 ? DType::kE4m3 : DType::kBf16;
  std::byte* data = weights_.storage.Allocate(view.bytes());
  view.data = data;
  const float limit = gain * std::sqrt(3.0f / static_cast<float>(cols));
  Prng prng(CounterDraw(seed_, 1, draws_++));
  if (fp8) {
    const int64_t blocks = CeilDiv(rows, kQuantBlock) * CeilDiv(cols, kQuantBlock);
    auto* scales = reinterpret_cast<float*>(weights_.storage.Allocate(blocks * sizeof(float)));
    // Codes spread over [-240, 240]; each block has a scale of its own.
    for (int64_t b = 0; b < blocks; ++b) scales[b] = limit / 240.0f * (0.75f + 0.5f * prng.Unit());
    view.scale_inv = scales;
    for (int64_t i = 0; i < rows * cols; ++i) {
      reinterpret_cast<E4m3*>(data)[i] = ToE4m3(480.0f * prng.Unit() - 240.0f);
    }
  } else {
    for (int64_t i = 0; i < rows * cols; ++i) {
      reinterpret_cast<Bf16*>(data)[i] = ToBf16(limit * (2.0f * prng.Unit() - 1.0f));
    }
  }
  return view;
}

absl::Span<const float> ToyModel::Vector(int64_t size, float center, float spread) {
  auto* data = reinterpret_cast<float*>(weights_.storage.Allocate(size * sizeof(float)));
  Prng prng(CounterDraw(seed_, 2, draws_++));
  for (int64_t i = 0; i < size; ++i) data[i] = center + spread * (2.0f * prng.Unit() - 1.0f);
  return {data, static_cast<size_t>(size)};
}

model::MlpWeights ToyModel::Mlp(int64_t intermediate, float gain) {
  const bool fp8 = config_.quantization.has_value();
  model::MlpWeights mlp;
  mlp.gate_proj = Matrix(intermediate, config_.hidden_size, fp8, gain);
  mlp.up_proj = Matrix(intermediate, config_.hidden_size, fp8, gain);
  mlp.down_proj = Matrix(config_.hidden_size, intermediate, fp8, gain);
  return mlp;
}

}  // namespace moebius::cluster_test
