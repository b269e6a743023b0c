#pragma once

// The arithmetic of one step, cut where it has to wait: the attention worker's part of every layer
// (DeepSeek-V3 report section 2.1), over buffers allocated once for the largest step.
//
//   compute.Begin(&batch);
//   compute.RunLayers();            // embedding, layers up to the next MoE layer's experts
//   while (compute.at_experts()) {
//     ... expert_input() goes to the router; meanwhile compute.RunShared(); the sum comes back ...
//     compute.SetRouted(sum);
//     compute.RunLayers();          // MoE residual, then on to the next one or to the end
//   }                               // at the end the batch's out arrays are filled
//
// Every row is computed from its own values and its own sequence's cache rows alone (row rule).
//
// Threading: one call at a time, on whichever compute thread; Begin, SetRouted and the accessors
// between calls. Allocates nothing after construction (the backend may, on first shapes).

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "attention_worker/attention_actor.h"
#include "attention_worker/kv_block_pool.h"
#include "attention_worker/step_batch.h"
#include "base/float_formats.h"
#include "base/ids.h"
#include "kernels/backend.h"
#include "model/config.h"
#include "model/weights.h"

namespace moebius::attention_worker {

class LayerCompute {
 public:
  // Borrows everything. max_positions bounds row positions.
  LayerCompute(const AttentionModel& model, const AttentionOptions& options, int64_t max_positions,
               KvBlockPool* cache);

  void Begin(StepBatch* batch);
  absl::Status RunLayers();
  absl::Status RunShared();

  // True between a RunLayers that stopped before the experts of layer() and SetRouted.
  bool at_experts() const { return at_experts_; }
  LayerId layer() const { return LayerId(static_cast<uint32_t>(layer_)); }
  // [batch.m, hidden]: rows after post_attention_layernorm; unchanged until the next RunLayers.
  const Bf16* expert_input() const { return x_.data(); }
  // The routed sums [batch.m, hidden]; must live until the next RunLayers has ended.
  void SetRouted(const Bf16* routed);

 private:
  absl::Status Attention(int64_t layer);
  absl::Status Mlp(const model::MlpWeights& mlp);  // x_ -> y_
  absl::Status Head();
  absl::Status HeadSlice(int32_t begin, int32_t count);
  absl::Status ScoreSlice(int32_t begin, int32_t count);
  absl::Status Norm(int64_t m, int64_t dim, const Bf16* x, int64_t x_stride, const float* weight,
                    double eps, Bf16* out);
  absl::Status Linear(int64_t m, const MatrixView& weight, const Bf16* x, int64_t x_stride,
                      Bf16* out);

  const model::ModelConfig& config_;
  const model::AttentionWorkerWeights& weights_;
  kernels::Backend& backend_;
  KvBlockPool& cache_;
  const kernels::MlaDims dims_;
  const float softmax_scale_;
  const int32_t head_slice_rows_;
  const int64_t sampled_vocab_;
  const std::vector<float> cos_sin_;  // [max_positions, qk_rope_head_dim / 2, 2]

  StepBatch* batch_ = nullptr;
  int64_t layer_ = 0;
  bool at_experts_ = false;
  const Bf16* routed_ = nullptr;

  // [max_step_tokens, ...]
  std::vector<Bf16> h_;         // residual stream [.., hidden]
  std::vector<Bf16> x_;         // normalised input of a half layer [.., hidden]
  std::vector<Bf16> q_latent_;  // [.., q_lora_rank]
  std::vector<Bf16> q_;         // [.., heads * q_head_dim]
  std::vector<Bf16> kv_;        // [.., latent_dim]
  std::vector<Bf16> heads_;     // [.., heads * v_head_dim]
  std::vector<Bf16> gate_;      // [.., widest MLP]
  std::vector<Bf16> up_;        // [.., widest MLP]
  std::vector<Bf16> y_;         // a half layer's output [.., hidden]
  // [head_slice_rows, ...]
  std::vector<Bf16> head_x_;   // gathered, then normalised final rows [.., hidden]
  std::vector<float> logits_;  // [.., vocab]
};

}  // namespace moebius::attention_worker
