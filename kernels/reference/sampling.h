#pragma once

// Choosing one token (kernels/sampling.h) and its log-probability. Pure, any thread.

#include <cstdint>

#include "absl/types/span.h"
#include "base/ids.h"
#include "kernels/sampling.h"

namespace moebius::kernels::reference {

// log softmax(logits)[token] in float32: logit - max - log(sum of exp(logit - max)).
float LogProbAt(absl::Span<const float> logits, TokenId token);

// Temperature 0: the largest logit, ties to the lower id. Otherwise: candidates in descending logit
// (ties: ascending id), the first top_k of them; e_i = exp((logit_i - max) / temperature); of those
// the shortest prefix whose sum reaches top_p of the sum of all candidates (at least one). With
// u = ToUnitFloat(CounterDraw(seed, 0, token_index)) the token is the first whose running sum
// exceeds u times the prefix's sum. Sums run in float32 in the candidates' order.
TokenId SampleRow(absl::Span<const float> logits, const SamplingParams& params,
                  uint64_t token_index);

}  // namespace moebius::kernels::reference
