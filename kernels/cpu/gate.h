#pragma once

// Expert choice for one token (GateSelectParams), after the scores' sigmoid or softmax. Pure, any
// thread, allocates nothing.

#include <cstdint>

#include "base/ids.h"
#include "kernels/moe.h"

namespace moebius::kernels::cpu {

// Limits of one gate, so that its working memory is on the stack.
inline constexpr int32_t kMaxExperts = 1024;
inline constexpr int32_t kMaxExpertsPerToken = 64;

// `scores`: [n_routed_experts] in float32; `bias` as in GateSelectParams. A NaN score is chosen
// last (by lower id), so the chosen ids are always distinct and in range, whatever the row holds.
// REQUIRES: CheckGateConfig(config).
void SelectExperts(const GateConfig& config, const float* scores, const float* bias,
                   ExpertId* experts, float* weights);

// CHECKs that the configuration is consistent and within the limits above.
void CheckGateConfig(const GateConfig& config);

}  // namespace moebius::kernels::cpu
