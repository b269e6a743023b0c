#pragma once

// The top tokens of one row of logits, for score requests. Their log-probabilities are the
// backend's business (kernels::TokenLogprobsParams). Pure.

#include <cstdint>

#include "base/ids.h"

namespace moebius::attention_worker {

// Writes the `n` tokens with the largest logits [vocab], best first, ties to the lower id. NaN
// logits are never chosen; places left over hold -1. REQUIRES: n <= vocab.
void MostLikelyTokens(const float* logits, int64_t vocab, uint32_t n, TokenId* ids);

}  // namespace moebius::attention_worker
