#pragma once

// A DeepSeek-V3-architecture model small enough for thousands of simulated clusters: random weights
// in memory, the same for the same options on every machine. Scaled so that logits spread over
// several units and the gate has no clear favourites, or wrong arithmetic would hide.

#include <cstdint>
#include <vector>

#include "kernels/moe.h"
#include "model/config.h"
#include "model/weights.h"

namespace moebius::cluster_test {

struct ToyModelOptions {
  bool fp8 = false;  // e4m3 weights with 128x128 scales and e4m3 expert rows; else BF16
  bool power_of_two_scales = false;  // of activations, with fp8
  bool q_lora = true;                // q_a / q_b, else one q_proj
  int64_t hidden = 64;               // 144 and above: ragged FP8 blocks
  int64_t layers = 3;
  int64_t first_dense = 1;
  int64_t experts = 12;
  int64_t groups = 4;
  int64_t topk_group = 2;
  int64_t top_k = 4;
  int64_t vocab = 192;
  int64_t max_positions = 512;
  uint64_t seed = 1;
};

class ToyModel {
 public:
  explicit ToyModel(const ToyModelOptions& options);
  ToyModel(const ToyModel&) = delete;
  ToyModel& operator=(const ToyModel&) = delete;

  const model::ModelConfig& config() const { return config_; }
  const model::AttentionWorkerWeights& weights() const { return weights_; }
  const model::MoeLayerWeights& gate(int64_t layer) const { return *weights_.layers[layer].moe; }
  // REQUIRES: `layer` is an MoE layer.
  const model::MlpWeights& expert(int64_t layer, int64_t expert) const {
    return experts_[layer * config_.n_routed_experts + expert];
  }
  kernels::GateConfig gate_config() const;

 private:
  MatrixView Matrix(int64_t rows, int64_t cols, bool fp8, float gain);
  absl::Span<const float> Vector(int64_t size, float center, float spread);
  model::MlpWeights Mlp(int64_t intermediate, float gain);

  model::ModelConfig config_;
  model::AttentionWorkerWeights weights_;   // its storage owns every matrix, the experts' too
  std::vector<model::MlpWeights> experts_;  // [layers * experts]; dense layers' entries are empty
  uint64_t draws_ = 0;
  uint64_t seed_;
};

}  // namespace moebius::cluster_test
