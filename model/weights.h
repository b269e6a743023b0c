#pragma once

// What each role computes with, as typed views over a Checkpoint.
//
// Large matrices are MatrixViews straight into the memory-mapped files (copied only if the file
// does not align them to their element size); norm weights, the gate's bias and the FP8 scales are
// converted to F32 and owned here. Loading checks every hosted tensor against the config: name
// present, shape, dtype, scale present exactly for F8_E4M3 with every scale finite and above 0.
// Tensors outside the role are not touched.
//
// Accepted element types: matrices F8_E4M3 (with `<name>_scale_inv` in F32, only if the config has
// a quantization_config) or BF16; routed experts must be F8_E4M3 exactly if the model is FP8, since
// they define the wire dtype; embedding, head, eh_proj BF16; gate weight BF16, or F32 whose
// values are all BF16 values (then narrowed, which loses nothing); norms and bias BF16 or F32.
//
// Lifetime: all views end with the Checkpoint or the weights object, whichever goes first. Weights
// are immutable after loading and may be read from any thread. They are movable; views stay valid.

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/ids.h"
#include "base/tensor_view.h"
#include "model/checkpoint.h"
#include "model/config.h"

namespace moebius::model {

// Owner of what cannot be used straight from the file: 64-byte aligned pieces at fixed addresses.
class WeightStorage {
 public:
  // Zero-filled; stays where it is until the storage goes.
  std::byte* Allocate(size_t bytes);
  // Of everything allocated.
  size_t bytes() const { return bytes_; }
  // Names of the checkpoint's tensors that were read through here, for verification against a
  // manifest (model/manifest.h). In the order of loading.
  const std::vector<std::string>& tensor_names() const { return tensor_names_; }
  void AddTensorName(std::string name) { tensor_names_.push_back(std::move(name)); }

 private:
  struct Deleter {
    void operator()(std::byte* data) const;
  };
  std::vector<std::unique_ptr<std::byte, Deleter>> pieces_;
  std::vector<std::string> tensor_names_;
  size_t bytes_ = 0;
};

// A SwiGLU feed-forward block: gate_proj, up_proj [intermediate, hidden], down_proj [hidden,
// intermediate].
struct MlpWeights {
  MatrixView gate_proj;
  MatrixView up_proj;
  MatrixView down_proj;
};

// The attention worker's part of an MoE layer.
struct MoeLayerWeights {
  MatrixView gate;                                  // [n_routed_experts, hidden], BF16
  absl::Span<const float> e_score_correction_bias;  // [n_routed_experts]; empty unless noaux_tc
  std::optional<MlpWeights> shared_experts;         // absent if n_shared_experts is 0
};

// One decoder layer without its routed experts. H heads, row layout within fused matrices: q head h
// is qk_nope then qk_rope rows; kv_b head h is qk_nope (k) then v_head_dim (v) rows.
struct AttentionLayerWeights {
  LayerId layer;
  absl::Span<const float> input_layernorm;           // [hidden]
  absl::Span<const float> post_attention_layernorm;  // [hidden]
  // Either q_proj alone, or q_a_proj, q_a_layernorm and q_b_proj.
  MatrixView q_proj;                       // [H * qk_head_dim, hidden]
  MatrixView q_a_proj;                     // [q_lora_rank, hidden]
  absl::Span<const float> q_a_layernorm;   // [q_lora_rank]
  MatrixView q_b_proj;                     // [H * qk_head_dim, q_lora_rank]
  MatrixView kv_a_proj_with_mqa;           // [kv_lora_rank + qk_rope_head_dim, hidden]
  absl::Span<const float> kv_a_layernorm;  // [kv_lora_rank]
  MatrixView kv_b_proj;                    // [H * (qk_nope_head_dim + v_head_dim), kv_lora_rank]
  MatrixView o_proj;                       // [hidden, H * v_head_dim]
  // Exactly one of the two.
  std::optional<MlpWeights> mlp;
  std::optional<MoeLayerWeights> moe;
};

// A multi-token-prediction module (DeepSeek-V3 report section 2.2). Embedding and output head are
// the main model's: copies of them in the checkpoint (embed_tokens, shared_head.head) are ignored,
// absent or not, since they are documented as shared parameters.
struct MtpLayerWeights {
  absl::Span<const float> enorm;  // [hidden], over the next token's embedding
  absl::Span<const float> hnorm;  // [hidden], over the main model's final hidden state
  MatrixView eh_proj;             // [hidden, 2 * hidden], columns: embedding half first
  AttentionLayerWeights layer;
  absl::Span<const float> shared_head_norm;  // [hidden]
};

struct AttentionWorkerWeights {
  MatrixView embed_tokens;                    // [vocab, hidden] BF16
  std::vector<AttentionLayerWeights> layers;  // [num_hidden_layers]
  absl::Span<const float> norm;               // [hidden]
  MatrixView lm_head;                         // [vocab, hidden] BF16; embed_tokens when tied
  // One per num_nextn_predict_layers; empty also if the checkpoint leaves the modules out wholly.
  std::vector<MtpLayerWeights> mtp;
  WeightStorage storage;
};

// One routed expert. Loads and unloads on its own, so an expert worker can change what it hosts
// expert by expert.
struct ExpertShard {
  LayerId layer;
  ExpertId expert;
  MlpWeights weights;
  WeightStorage storage;
  // Of the three matrices and their scales.
  int64_t bytes() const;
};

absl::StatusOr<AttentionWorkerWeights> LoadAttentionWorkerWeights(const Checkpoint& checkpoint,
                                                                  const ModelConfig& config);

// Errors also if `layer` is no MoE layer or `expert` is out of range.
absl::StatusOr<ExpertShard> LoadExpertShard(const Checkpoint& checkpoint, const ModelConfig& config,
                                            LayerId layer, ExpertId expert);

// The gate of one MoE layer alone: what a router on a node of its own needs. The views live in
// `storage`.
absl::StatusOr<MoeLayerWeights> LoadGate(const Checkpoint& checkpoint, const ModelConfig& config,
                                         LayerId layer, WeightStorage& storage);

// True if the checkpoint holds the MTP module's layer (false for models without one).
bool HasMtpLayer(const Checkpoint& checkpoint, const ModelConfig& config, int64_t module);

// All MoE layer ids in ascending order, MTP layers that the checkpoint holds included.
std::vector<LayerId> MoeLayers(const Checkpoint& checkpoint, const ModelConfig& config);

}  // namespace moebius::model
