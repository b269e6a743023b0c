#include "kernels/reference/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "base/prng.h"

namespace moebius::kernels::reference {

float LogProbAt(absl::Span<const float> logits, TokenId token) {
  const float maximum = *std::max_element(logits.begin(), logits.end());
  float sum = 0.0f;
  for (const float logit : logits) sum += std::exp(logit - maximum);
  return logits[static_cast<size_t>(token)] - maximum - std::log(sum);
}

TokenId SampleRow(absl::Span<const float> logits, const SamplingParams& params,
                  uint64_t token_index) {
  CHECK(!logits.empty());
  if (params.temperature == 0.0f) {
    // max_element returns the first of equal elements: the lower id.
    return static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  std::vector<TokenId> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < order.size()) {
    order.resize(static_cast<size_t>(params.top_k));
  }
  const float maximum = logits[order[0]];
  std::vector<float> e(order.size());
  float total = 0.0f;
  for (size_t i = 0; i < order.size(); ++i) {
    e[i] = std::exp((logits[order[i]] - maximum) / params.temperature);
    total += e[i];
  }
  size_t kept = 0;
  float prefix = 0.0f;
  do {
    prefix += e[kept++];
  } while (kept < e.size() && prefix < params.top_p * total);

  const float u = ToUnitFloat(CounterDraw(params.seed, 0, token_index));
  float running = 0.0f;
  for (size_t i = 0; i < kept; ++i) {
    running += e[i];
    if (running > u * prefix) return order[i];
  }
  return order[kept - 1];
}

}  // namespace moebius::kernels::reference
