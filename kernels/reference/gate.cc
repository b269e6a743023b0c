#include "kernels/reference/gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/check.h"

namespace moebius::kernels::reference {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

std::vector<float> Scores(ScoringFunc scoring_func, absl::Span<const float> logits) {
  std::vector<float> scores(logits.begin(), logits.end());
  if (scoring_func == ScoringFunc::kSigmoid) {
    for (float& value : scores) value = 1.0f / (1.0f + std::exp(-value));
    return scores;
  }
  const float maximum = *std::max_element(scores.begin(), scores.end());
  float sum = 0.0f;
  for (float& value : scores) {
    value = std::exp(value - maximum);
    sum += value;
  }
  for (float& value : scores) value /= sum;
  return scores;
}

// Indices of the `count` largest values, best first; equal values in ascending index.
std::vector<size_t> Largest(absl::Span<const float> values, size_t count) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return values[a] > values[b]; });
  order.resize(count);
  return order;
}

float GroupScore(TopkMethod method, absl::Span<const float> members) {
  std::vector<float> sorted(members.begin(), members.end());
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  if (method == TopkMethod::kNoauxTc) return sorted[0] + (sorted.size() > 1 ? sorted[1] : 0.0f);
  return sorted[0];
}

}  // namespace

void GateSelectRow(const GateConfig& config, absl::Span<const float> logits,
                   absl::Span<const float> bias, absl::Span<ExpertId> experts,
                   absl::Span<float> weights) {
  const size_t count = static_cast<size_t>(config.n_routed_experts);
  const size_t top_k = static_cast<size_t>(config.num_experts_per_tok);
  const size_t groups = static_cast<size_t>(config.n_group);
  CHECK_EQ(logits.size(), count);
  CHECK(bias.empty() || bias.size() == count);
  CHECK_EQ(experts.size(), top_k);
  CHECK_EQ(weights.size(), top_k);
  CHECK_LE(top_k, count);

  const std::vector<float> scores = Scores(config.scoring_func, logits);
  std::vector<float> choice = scores;
  for (size_t e = 0; e < bias.size(); ++e) choice[e] += bias[e];

  if (groups > 1 && config.topk_method != TopkMethod::kGreedy) {
    CHECK_EQ(count % groups, 0u);
    const size_t group_size = count / groups;
    std::vector<float> group_scores(groups);
    for (size_t g = 0; g < groups; ++g) {
      group_scores[g] =
          GroupScore(config.topk_method, absl::MakeConstSpan(&choice[g * group_size], group_size));
    }
    std::vector<bool> kept(groups, false);
    for (const size_t g : Largest(group_scores, static_cast<size_t>(config.topk_group))) {
      kept[g] = true;
    }
    for (size_t e = 0; e < count; ++e) {
      if (!kept[e / group_size]) choice[e] = kMinusInfinity;
    }
  }

  std::vector<size_t> chosen = Largest(choice, top_k);
  std::sort(chosen.begin(), chosen.end());
  float sum = 0.0f;
  for (size_t j = 0; j < top_k; ++j) {
    experts[j] = ExpertId(static_cast<uint32_t>(chosen[j]));
    weights[j] = scores[chosen[j]];
    sum += weights[j];
  }
  for (float& weight : weights) {
    if (config.norm_topk_prob) weight /= sum + 1e-20f;
    weight *= config.routed_scaling_factor;
  }
}

}  // namespace moebius::kernels::reference
