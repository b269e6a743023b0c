#pragma once

// What "identical" means: the model evaluated in the plainest way there is. One sequence, one row
// at a time, a contiguous cache, no batching, no scheduler, no router, no messages; only the
// Backend is shared with the serving path. Whatever a cluster does, its ids, logprobs and digests
// must be these bits. Written apart from attention_worker/ and router/ on purpose: it shares none
// of their code.

#include <cstdint>
#include <functional>
#include <vector>

#include "base/float_formats.h"
#include "base/ids.h"
#include "kernels/backend.h"
#include "tests/cluster/toy_model.h"

namespace moebius::cluster_test {

struct OracleToken {
  TokenId token = -1;
  float logprob = 0;
  uint64_t row_digest = 0;
  friend bool operator==(const OracleToken&, const OracleToken&) = default;
};

struct OracleRequest {
  std::vector<TokenId> prompt;
  kernels::SamplingParams sampling;
  uint64_t max_tokens = 0;
  std::vector<TokenId> eos_token_ids;  // ends after one of these; empty = never
};

class SequentialOracle {
 public:
  // Borrows both.
  SequentialOracle(const ToyModel* model, kernels::Backend* backend);

  std::vector<OracleToken> Generate(const OracleRequest& request);

  // The routed sum of one row of an MoE layer: gate, one expert after another, canonical combine.
  void RoutedSum(int64_t layer, const Bf16* x, Bf16* out);

 private:
  // Runs one position through all layers; the result is the row after model.norm.
  void Position(TokenId token, int64_t position);
  void Attention(int64_t layer, int64_t position);
  void Mlp(const model::MlpWeights& mlp, const std::vector<Bf16>& x, std::vector<Bf16>& out);
  std::vector<Bf16> Linear(const MatrixView& weight, const std::vector<Bf16>& x);
  std::vector<Bf16> Norm(const std::vector<Bf16>& x, absl::Span<const float> weight, double eps);

  const ToyModel& model_;
  const model::ModelConfig& config_;
  kernels::Backend& backend_;
  kernels::MlaDims dims_;
  std::vector<float> cos_sin_;
  std::vector<int32_t> block_table_;       // 0, 1, 2, ...
  std::vector<std::vector<Bf16>> caches_;  // per layer
  std::vector<Bf16> h_;
  std::vector<Bf16> final_;
};

}  // namespace moebius::cluster_test
