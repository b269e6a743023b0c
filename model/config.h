#pragma once

// config.json of the DeepSeek-V3 family: what the architecture is. Fields carry the names of the
// Hugging Face file; derived values are member functions. Accepted: DeepSeek-V2, V2-Lite
// (deepseek_v2), V3, R1, V3.1, Moonlight (deepseek_v3), Kimi-K2 (kimi_k2). Everything else is
// refused by its model_type, and a setting that would change the arithmetic in a way we do not
// implement is refused by its name: a model is served as its file says or not at all.
//
// A field without a default in Hugging Face's configuration classes must be present.
// A ModelConfig is a plain value; reading it from several threads is safe.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/ids.h"

namespace moebius::model {

enum class ModelType : uint8_t { kDeepseekV2, kDeepseekV3, kKimiK2 };
enum class ScoringFunc : uint8_t { kSoftmax, kSigmoid };
enum class TopkMethod : uint8_t { kGreedy, kGroupLimitedGreedy, kNoauxTc };

const char* Name(ModelType type);  // as in config.json
const char* Name(ScoringFunc scoring_func);
const char* Name(TopkMethod method);

// Element type of expert input rows, on the wire and in memory: e4m3 codes with 1x128 scales for
// FP8 checkpoints, bf16 for BF16 ones. A property of the model, never of a link.
enum class WireDtype : uint8_t { kBf16 = 0, kE4m3 = 1 };
const char* Name(WireDtype dtype);

// rope_scaling of type "yarn" (Peng et al. 2023); see model/rope.h for what it does.
struct YarnScaling {
  double factor = 1;                             // > 1
  int64_t original_max_position_embeddings = 0;  // tokens
  double beta_fast = 32;
  double beta_slow = 1;
  double mscale = 1;
  double mscale_all_dim = 0;
  friend bool operator==(const YarnScaling&, const YarnScaling&) = default;
};

// quantization_config with quant_method "fp8": e4m3 weights in 128x128 blocks, activations
// quantised per token and 128 channels while running.
struct Fp8Quantization {
  // V3.1's scale_fmt "ue8m0": activation scales are rounded up to powers of two.
  bool power_of_two_scales = false;
  friend bool operator==(const Fp8Quantization&, const Fp8Quantization&) = default;
};

struct ModelConfig {
  ModelType model_type = ModelType::kDeepseekV3;

  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_nextn_predict_layers = 0;  // MTP modules, stored after the last main layer
  int64_t max_position_embeddings = 0;   // tokens
  double rms_norm_eps = 1e-6;

  // Multi-head latent attention.
  int64_t num_attention_heads = 0;
  std::optional<int64_t> q_lora_rank;  // absent: one q_proj instead of q_a / q_b
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  double rope_theta = 10000;
  std::optional<YarnScaling> rope_scaling;

  // Feed-forward and experts. n_routed_experts == 0 means no layer is MoE.
  int64_t intermediate_size = 0;      // dense MLP
  int64_t moe_intermediate_size = 0;  // each routed expert
  int64_t n_routed_experts = 0;
  int64_t n_shared_experts = 0;  // stored as one MLP of n_shared_experts * moe_intermediate_size
  int64_t num_experts_per_tok = 0;
  int64_t first_k_dense_replace = 0;
  int64_t moe_layer_freq = 1;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  ScoringFunc scoring_func = ScoringFunc::kSigmoid;
  TopkMethod topk_method = TopkMethod::kNoauxTc;
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1;

  bool tie_word_embeddings = false;  // lm_head.weight is model.embed_tokens.weight
  std::optional<TokenId> bos_token_id;
  std::vector<TokenId> eos_token_id;  // from config.json and generation_config.json; ascending

  std::optional<Fp8Quantization> quantization;  // absent: a BF16 checkpoint

  // The RMSNorms inside attention (q_a_layernorm, kv_a_layernorm) use this eps whatever
  // rms_norm_eps says, as the reference implementations do.
  static constexpr double kLatentNormEps = 1e-6;

  // Main layers, then one per MTP module: layer ids run from 0 to total_layers() - 1.
  int64_t total_layers() const { return num_hidden_layers + num_nextn_predict_layers; }
  bool is_mtp_layer(int64_t layer) const { return layer >= num_hidden_layers; }
  // MTP modules hold an MoE layer if the model has experts at all.
  bool is_moe_layer(int64_t layer) const;
  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  // Values per token and layer in the latent cache.
  int64_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }
  int64_t shared_intermediate_size() const { return n_shared_experts * moe_intermediate_size; }
  // Factor of attention scores: qk_head_dim^-1/2 * m^2, m = YaRN's attention temperature
  // (DeepSeek-V3 model code; m = 1 without YaRN or without mscale_all_dim).
  double softmax_scale() const;
  WireDtype wire_dtype() const { return quantization ? WireDtype::kE4m3 : WireDtype::kBf16; }
  bool power_of_two_scales() const { return quantization && quantization->power_of_two_scales; }
};

// Errors: INVALID_ARGUMENT (malformed, missing or out of range; names the field), UNIMPLEMENTED
// (understood, but not an architecture or setting we serve).
absl::StatusOr<ModelConfig> ParseConfig(absl::string_view json);

// Adds the end tokens of a generation_config.json to `config`. Other fields are ignored: sampling
// defaults are the caller's business.
absl::Status MergeGenerationConfig(absl::string_view json, ModelConfig& config);

// `dir`/config.json and, if present, generation_config.json. Errors name the file.
absl::StatusOr<ModelConfig> LoadConfig(const std::string& dir);

}  // namespace moebius::model
