#pragma once

// A whole model over any Backend in batches of rows, as a serving step runs it: rows of several
// sequences at any positions, latents in a paged cache. Small and synchronous; for tests of
// backends only (the serving path is attention_worker/, router/ and expert_worker/).

#include <cstdint>
#include <string>
#include <vector>

#include "base/float_formats.h"
#include "base/ids.h"
#include "kernels/backend.h"
#include "kernels/reference/model_forward.h"

namespace moebius::kernels::cpu {

struct BatchRow {
  TokenId token = 0;
  SequenceRow where;
  // Not 0: the row's embedding is overwritten with this value (NaN, infinity).
  float poison = 0.0f;
};

struct BatchResult {
  std::vector<Bf16> final_hidden;  // [m, hidden], after model.norm
  std::vector<float> logits;       // [m, vocab]
  std::vector<uint64_t> digests;   // [m], of the greedy token's event
  std::vector<uint64_t> hashes;    // [m], of final hidden row and logits row: every bit
};

class BatchedForward {
 public:
  // Borrows both; the cache has `num_blocks` blocks per layer.
  BatchedForward(const reference::ModelForward& model, Backend& backend, int64_t num_blocks);

  // Runs all layers for `rows`, writing their latents. No two rows share a cache row.
  BatchResult Run(const std::vector<BatchRow>& rows);

 private:
  void Attention(size_t layer, std::vector<Bf16>& h, const std::vector<SequenceRow>& rows);
  void Moe(size_t layer, const std::vector<Bf16>& x, std::vector<Bf16>& h);
  std::vector<Bf16> Norm(const std::vector<Bf16>& x, int64_t dim, const float* weight, double eps);
  std::vector<Bf16> Linear(const MatrixView& weight, const std::vector<Bf16>& x);
  std::vector<Bf16> Mlp(const model::MlpWeights& mlp, const std::vector<Bf16>& x);

  const reference::ModelForward& model_;
  Backend& backend_;
  MlaDims dims_;
  std::vector<float> cos_sin_;
  std::vector<std::vector<Bf16>> caches_;  // per layer
};

}  // namespace moebius::kernels::cpu
