#include "kernels/cpu/sampler.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "base/check.h"
#include "base/prng.h"

namespace moebius::kernels::cpu {
namespace {

// A heap with this order has the best candidate on top. It is total, so what is popped in which
// order does not depend on how the heap was built.
bool IsWorse(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit < b.logit : a.id > b.id;
}

TokenId Greedy(const float* logits, int64_t vocab) {
  int64_t best = 0;
  float best_logit = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < vocab; ++i) {
    if (logits[i] > best_logit) {
      best = i;
      best_logit = logits[i];
    }
  }
  return static_cast<TokenId>(best);
}

}  // namespace

TokenId SampleToken(const KernelTable& kernels, const float* logits, int64_t vocab,
                    const SamplingParams& params, uint64_t token_index, float* terms,
                    Candidate* candidates) {
  CHECK_GT(vocab, 0);
  if (!(params.temperature > 0.0f)) return Greedy(logits, vocab);

  const float maximum = kernels.max(logits, vocab);
  kernels.sum_exp(logits, vocab, maximum, params.temperature, terms);
  double total = 0.0;
  for (int64_t i = 0; i < vocab; ++i) {
    const bool is_nan = logits[i] != logits[i];
    if (terms[i] != terms[i]) terms[i] = 0.0f;  // a NaN logit, or every logit is -infinity
    candidates[i] = {is_nan ? -std::numeric_limits<float>::infinity() : logits[i],
                     static_cast<TokenId>(i)};
    total += terms[i];
  }

  // Candidates are popped only as far as the draw needs them: [vocab - popped, vocab) in ascending
  // order of quality is what has left the heap.
  const auto pop_best = [&](int64_t popped) {
    std::pop_heap(candidates, candidates + (vocab - popped), IsWorse);
    return candidates[vocab - popped - 1];
  };
  std::make_heap(candidates, candidates + vocab, IsWorse);
  const int64_t limit = params.top_k > 0 && params.top_k < vocab ? int64_t{params.top_k} : vocab;
  int64_t popped = 0;
  if (limit < vocab) {
    total = 0.0;
    while (popped < limit) total += terms[pop_best(popped++).id];
  }
  const auto candidate = [&](int64_t i) {
    if (i == popped) pop_best(popped++);
    return candidates[vocab - 1 - i];
  };

  double mass = total;
  int64_t kept = limit;
  if (params.top_p < 1.0f) {
    const double target = static_cast<double>(params.top_p) * total;
    mass = 0.0;
    kept = 0;
    do {
      mass += terms[candidate(kept++).id];
    } while (kept < limit && mass < target);
  }
  const double u = ToUnitFloat(CounterDraw(params.seed, 0, token_index));
  double running = 0.0;
  for (int64_t i = 0; i < kept; ++i) {
    const TokenId id = candidate(i).id;
    running += terms[id];
    if (running > u * mass) return id;
  }
  return candidate(kept - 1).id;
}

void TokenLogprobs(const KernelTable& kernels, const float* logits, int64_t vocab,
                   absl::Span<const TokenId> tokens, float* logprobs) {
  std::fill_n(logprobs, tokens.size(), 0.0f);
  if (std::all_of(tokens.begin(), tokens.end(), [](TokenId token) { return token == -1; })) return;
  const float maximum = kernels.max(logits, vocab);
  const float sum = kernels.sum_exp(logits, vocab, maximum, 1.0f, nullptr);
  const auto log_sum = static_cast<float>(NaturalLog(static_cast<double>(sum)));
  for (size_t j = 0; j < tokens.size(); ++j) {
    if (tokens[j] == -1) continue;
    CHECK(tokens[j] >= 0 && tokens[j] < vocab);
    logprobs[j] = (logits[tokens[j]] - maximum) - log_sum;
  }
}

double NaturalLog(double x) {
  // x = 2^n * m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(t), t = (m - 1) / (m + 1).
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  int64_t n = static_cast<int64_t>((bits >> 52) & 0x7FF) - 1023;
  double m = std::bit_cast<double>((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (n == 1024) return x;  // infinity or NaN
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++n;
  }
  const double t = (m - 1.0) / (m + 1.0);
  const double t2 = t * t;
  double series = 0.0;
  for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * t2;
  const double log_m = 2.0 * (t + t * series);
  return static_cast<double>(n) * 0.6931471805599453 + log_m;
}

}  // namespace moebius::kernels::cpu
