#include "kernels/cpu/gate.h"

#include <array>
#include <limits>

#include "base/check.h"

namespace moebius::kernels::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Marks the `count` largest of values[0, n): value descending, lower index first; NaN must not
// occur.
void MarkLargest(const float* values, int32_t n, int32_t count, bool* marked) {
  for (int32_t i = 0; i < n; ++i) marked[i] = false;
  for (int32_t j = 0; j < count; ++j) {
    int32_t best = -1;
    for (int32_t i = 0; i < n; ++i) {
      if (!marked[i] && (best < 0 || values[i] > values[best])) best = i;
    }
    marked[best] = true;
  }
}

// V3: the sum of the group's two largest choice values; V2: the largest.
float GroupScore(TopkMethod method, const float* choice, int32_t group_size) {
  float first = kMinusInfinity, second = kMinusInfinity;
  for (int32_t i = 0; i < group_size; ++i) {
    if (choice[i] > first) {
      second = first;
      first = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  if (method != TopkMethod::kNoauxTc || group_size == 1) return first;
  return first + second;
}

}  // namespace

void CheckGateConfig(const GateConfig& config) {
  CHECK(config.n_routed_experts > 0 && config.n_routed_experts <= kMaxExperts);
  CHECK(config.num_experts_per_tok > 0 && config.num_experts_per_tok <= kMaxExpertsPerToken);
  CHECK_LE(config.num_experts_per_tok, config.n_routed_experts);
  CHECK(config.n_group > 0 && config.n_routed_experts % config.n_group == 0);
  CHECK(config.topk_group > 0 && config.topk_group <= config.n_group);
}

void SelectExperts(const GateConfig& config, const float* scores, const float* bias,
                   ExpertId* experts, float* weights) {
  const int32_t count = config.n_routed_experts;
  std::array<float, kMaxExperts> choice;
  for (int32_t e = 0; e < count; ++e) {
    const float value = bias == nullptr ? scores[e] : scores[e] + bias[e];
    choice[e] = value == value ? value : kMinusInfinity;
  }
  std::array<bool, kMaxExperts> marked;
  if (config.n_group > 1 && config.topk_method != TopkMethod::kGreedy) {
    const int32_t group_size = count / config.n_group;
    std::array<float, kMaxExperts> group_scores;
    for (int32_t g = 0; g < config.n_group; ++g) {
      group_scores[g] = GroupScore(config.topk_method, &choice[g * group_size], group_size);
    }
    MarkLargest(group_scores.data(), config.n_group, config.topk_group, marked.data());
    for (int32_t e = 0; e < count; ++e) {
      if (!marked[e / group_size]) choice[e] = kMinusInfinity;
    }
  }
  MarkLargest(choice.data(), count, config.num_experts_per_tok, marked.data());

  float sum = 0.0f;
  int32_t slot = 0;
  for (int32_t e = 0; e < count; ++e) {
    if (!marked[e]) continue;
    experts[slot] = ExpertId(static_cast<uint32_t>(e));
    weights[slot] = scores[e];
    sum += scores[e];
    ++slot;
  }
  for (int32_t j = 0; j < slot; ++j) {
    if (config.norm_topk_prob) weights[j] /= sum + 1e-20f;
    weights[j] *= config.routed_scaling_factor;
  }
}

}  // namespace moebius::kernels::cpu
