#include "attention_worker/score.h"

#include "base/check.h"

namespace moebius::attention_worker {

void TopLogProbs(const ScoreRow& row, uint32_t n, TokenId* ids, float* logprobs) {
  CHECK_LE(static_cast<int64_t>(n), row.vocab);
  if (n == 0) return;
  uint32_t found = 0;
  for (TokenId id = 0; id < row.vocab; ++id) {
    const float logit = row.logits[id];
    if (logit != logit) continue;
    // Ids ascend, so a newcomer goes behind its equals.
    if (found == n && !(logit > row.logits[ids[n - 1]])) continue;
    uint32_t place = found < n ? found++ : n - 1;
    for (; place > 0 && logit > row.logits[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = id;
  }
  for (uint32_t i = 0; i < found; ++i) logprobs[i] = row.LogProb(ids[i]);
  for (uint32_t i = found; i < n; ++i) {
    ids[i] = -1;
    logprobs[i] = 0;
  }
}

}  // namespace moebius::attention_worker
