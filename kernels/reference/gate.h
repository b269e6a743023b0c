#pragma once

// The router's choice for one token (kernels/moe.h; DeepSeek-V3 report section 2.1.2, DeepSeek-V2
// report section 2.1.2). Pure, any thread.

#include "absl/types/span.h"
#include "base/ids.h"
#include "kernels/moe.h"

namespace moebius::kernels::reference {

// s = sigmoid(logits) or softmax(logits);  b = s + bias (selection only; bias may be empty).
// Groups (n_group > 1, not greedy): score = sum of the two largest b (noaux_tc) or the largest
// (group_limited_greedy); the topk_group best are kept, b of the others becomes -infinity.
// experts = the num_experts_per_tok largest b, written in ascending id;  w = s of the chosen (never
// b), divided by their sum + 1e-20 if norm_topk_prob, times routed_scaling_factor.
// Ties go to the lower index, for groups and experts. All in float32.
void GateSelectRow(const GateConfig& config, absl::Span<const float> logits,
                   absl::Span<const float> bias, absl::Span<ExpertId> experts,
                   absl::Span<float> weights);

}  // namespace moebius::kernels::reference
