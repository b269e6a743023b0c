#pragma once

// Draws one token from a row of logits (SampleParams), in exactly this way:
//
//   temperature 0: the largest logit, ties to the lower id.
//   otherwise      e_i = exp((logit_i - max) / temperature) in float32 with the kernels' own exp;
//                  candidates in descending logit (ties: ascending id), the first top_k of them;
//                  total = the sum of their e (double, in that order; without top_k: of all e, in
//                  ascending id);
//                  kept = the shortest prefix whose sum (double, in order) reaches top_p * total,
//                  at least one, all of them if top_p >= 1; mass = its sum (top_p >= 1: total);
//                  u = ToUnitFloat(CounterDraw(seed, 0, token_index));
//                  the token is the first whose running sum exceeds u * mass, else the last kept.
//
//   logprob = (logit - max) - log(sum of exp(logit_i - max)): float32 lane sums and the fixed tree,
//   the logarithm in double, of the unmodified logits.
//
// A NaN logit counts as -infinity. Pure, any thread; allocates nothing.

#include <cstdint>

#include "absl/types/span.h"
#include "base/ids.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/sampling.h"

namespace moebius::kernels::cpu {

// One candidate of a draw.
struct Candidate {
  float logit;
  TokenId id;
};

// `terms` [vocab] and `candidates` [vocab] are working memory of the caller. REQUIRES: vocab > 0.
TokenId SampleToken(const KernelTable& kernels, const float* logits, int64_t vocab,
                    const SamplingParams& params, uint64_t token_index, float* terms,
                    Candidate* candidates);

// logprobs[j] = log softmax at tokens[j], 0 where it is -1. A token's bits do not depend on which
// others are asked for. REQUIRES: every token is -1 or within [0, vocab).
void TokenLogprobs(const KernelTable& kernels, const float* logits, int64_t vocab,
                   absl::Span<const TokenId> tokens, float* logprobs);

// Natural logarithm of a normal, positive double, within 2 units in the last place; the same bits
// everywhere (libm's may differ by version and CPU).
double NaturalLog(double x);

}  // namespace moebius::kernels::cpu
