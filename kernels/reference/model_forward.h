#pragma once

// A whole model, one sequence at a time, in naive loops: the oracle of tests. Every position is
// computed by the row functions of this folder from the token ids alone; no batching, no paging, no
// reuse between calls. With Rounding::kServing this is what a served model must approximate, with
// kFloat32 it agrees with golden results to float32 rounding.
//
// Formulas: DeepSeek-V2 report section 2.1 (MLA), V3 report sections 2.1 and 2.2 (MoE, MTP).
// Config and weights are plain members, so that a test can plant a mistake. Const members may be
// called from any thread.

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/ids.h"
#include "kernels/moe.h"
#include "kernels/reference/rounding.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/weights.h"

namespace moebius::kernels::reference {

// Rows of one sequence, dense and row-major.
struct Rows {
  int64_t count = 0;
  int64_t dim = 0;
  std::vector<float> values;  // [count, dim]

  Rows() = default;
  Rows(int64_t row_count, int64_t row_dim)
      : count(row_count), dim(row_dim), values(static_cast<size_t>(row_count * row_dim)) {}
  absl::Span<float> operator[](int64_t row) {
    return absl::MakeSpan(values.data() + row * dim, static_cast<size_t>(dim));
  }
  absl::Span<const float> operator[](int64_t row) const {
    return absl::MakeConstSpan(values.data() + row * dim, static_cast<size_t>(dim));
  }
};

struct ForwardResult {
  std::vector<Rows> hidden_states;  // after the embedding, then after each layer; [n, hidden]
  std::vector<Rows> latents;        // per layer, the rows of the latent cache; [n, latent_dim]
  Rows final_hidden;                // after model.norm; [n, hidden]
  Rows logits;                      // [n, vocab]
};

// Row i predicts token i + 2 from final_hidden[i] and the embedding of token i + 1.
struct MtpResult {
  Rows hidden;  // after shared_head.norm; [n - 1, hidden]
  Rows logits;  // [n - 1, vocab]
};

GateConfig MakeGateConfig(const model::ModelConfig& config);

class ModelForward {
 public:
  // Loads everything, all experts included. Errors are those of model/.
  static absl::StatusOr<std::unique_ptr<ModelForward>> Load(const std::string& dir);

  // REQUIRES: every id within the vocabulary.
  ForwardResult Forward(absl::Span<const TokenId> ids, Rounding rounding) const;

  // The MTP module over a whole sequence; final_hidden as Forward gives it.
  // REQUIRES: the checkpoint has the module; ids.size() >= 2.
  MtpResult Mtp(absl::Span<const TokenId> ids, const Rows& final_hidden, Rounding rounding) const;

  // `count` greedy tokens after `prompt`, whatever end tokens the config names.
  std::vector<TokenId> Greedy(absl::Span<const TokenId> prompt, int64_t count,
                              Rounding rounding) const;

  model::ModelConfig config;
  model::AttentionWorkerWeights weights;
  // [layer][expert]; empty for dense layers. Layers of MTP modules come last.
  std::vector<std::vector<model::ExpertShard>> experts;

 private:
  ModelForward() = default;
  Rows EmbedTokens(absl::Span<const TokenId> ids) const;
  Rows Attention(const model::AttentionLayerWeights& layer, const Rows& x, Rounding rounding,
                 Rows* latents) const;
  void Moe(const model::AttentionLayerWeights& layer, absl::Span<const float> x, Rounding rounding,
           absl::Span<float> y) const;
  void Layer(const model::AttentionLayerWeights& layer, Rounding rounding, Rows& h,
             Rows* latents) const;

  std::unique_ptr<model::Checkpoint> checkpoint_;
};

// log softmax of each row of logits at the token that follows: [ids.size() - shift] values, of
// token i + shift at row i.
std::vector<float> NextLogProbs(const Rows& logits, absl::Span<const TokenId> ids, int64_t shift);

}  // namespace moebius::kernels::reference
