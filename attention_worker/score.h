#pragma once

// Log-probabilities of given tokens from one row of logits. The backend's own greedy draw supplies
// the normaliser (its log-softmax at the largest logit, summed in the backend's fixed order), so a
// score needs no exponential here and stays in the backend's numerics class:
//   logprob(i) = logprob(best) + (logit(i) - logit(best)), each operation once, in float32.
// For the token with the largest logit these are the bits that a greedy generation reports. Pure.

#include <cstdint>

#include "base/ids.h"

namespace moebius::attention_worker {

struct ScoreRow {
  const float* logits = nullptr;  // [vocab]
  int64_t vocab = 0;
  TokenId best = 0;        // largest logit, ties to the lower id
  float best_logprob = 0;  // the backend's

  float LogProb(TokenId token) const { return best_logprob + (logits[token] - logits[best]); }
};

// Writes the `n` most likely tokens, best first, ties to the lower id, and their log-probabilities.
// NaN logits are never chosen; places left over hold id -1 and logprob 0. REQUIRES: n <= vocab.
void TopLogProbs(const ScoreRow& row, uint32_t n, TokenId* ids, float* logprobs);

}  // namespace moebius::attention_worker
