#include "attention_worker/most_likely_tokens.h"

#include <algorithm>

#include "base/check.h"

namespace moebius::attention_worker {

void MostLikelyTokens(const float* logits, int64_t vocab, uint32_t n, TokenId* ids) {
  CHECK_LE(static_cast<int64_t>(n), vocab);
  std::fill_n(ids, n, -1);
  if (n == 0) return;
  uint32_t found = 0;
  for (TokenId id = 0; id < vocab; ++id) {
    const float logit = logits[id];
    if (logit != logit) continue;
    // Ids ascend, so a newcomer goes behind its equals.
    if (found == n && !(logit > logits[ids[n - 1]])) continue;
    uint32_t place = found < n ? found++ : n - 1;
    for (; place > 0 && logit > logits[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = id;
  }
}

}  // namespace moebius::attention_worker
