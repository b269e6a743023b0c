#include "kernels/cuda/gate_select/gate_select.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/gate_select/select_by_groups.cuh"
#include "kernels/cuda/gate_select/select_by_warp.cuh"

namespace moebius::kernels::cuda {
namespace {

template <int kPerLane, int kWarps, bool kAnyGroups>
absl::Status LaunchByWarp(const Gate& gate, cudaStream_t stream) {
  return LaunchDependent("GateSelect", SelectByWarp<kPerLane, kWarps, kAnyGroups>,
                         dim3(static_cast<unsigned>((gate.m + kWarps - 1) / kWarps)), 32 * kWarps,
                         stream, gate);
}

// Few tokens: each on a multiprocessor of its own, or with few others.
constexpr int kFew = 528;
constexpr int kMostByGroups = kFew;

template <int kPerLane>
absl::Status LaunchFor(const Gate& gate, cudaStream_t stream) {
  // Whole lanes of one group each, a power of two of them: no shared memory for the group step.
  const int lanes = gate.group_size / gate.per_lane;
  const bool whole_lanes = gate.group_size % gate.per_lane == 0 && (lanes & (lanes - 1)) == 0;
  if (gate.groups > 1 && !whole_lanes) return LaunchByWarp<kPerLane, 4, true>(gate, stream);
  if (gate.m <= kFew) return LaunchByWarp<kPerLane, 1, false>(gate, stream);
  return LaunchByWarp<kPerLane, 4, false>(gate, stream);
}

absl::Status Validate(const GateSelectParams& p) {
  const GateConfig& c = p.config;
  constexpr const char* kOp = "GateSelect";
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, INT32_MAX / kGateMaxExperts));
  RETURN_IF_ERROR(CheckRange(kOp, "n_routed_experts", c.n_routed_experts, 1, kGateMaxExperts));
  RETURN_IF_ERROR(CheckRange(kOp, "num_experts_per_tok", c.num_experts_per_tok, 1,
                             std::min(kGateMaxExpertsPerToken, c.n_routed_experts)));
  RETURN_IF_ERROR(CheckRange(kOp, "n_group", c.n_group, 1, c.n_routed_experts));
  if (c.n_routed_experts % c.n_group != 0) {
    return Refuse(kOp, absl::StrCat("n_group is ", c.n_group, ", not a divisor of the ",
                                    c.n_routed_experts, " experts"));
  }
  RETURN_IF_ERROR(CheckRange(kOp, "topk_group", c.topk_group, 1, c.n_group));
  RETURN_IF_ERROR(CheckPointer(kOp, "logits", p.logits, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "experts", p.experts, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "weights", p.weights, 4));
  return p.bias == nullptr ? absl::OkStatus() : CheckPointer(kOp, "bias", p.bias, 4);
}

}  // namespace

absl::Status LaunchGateSelect(const GateSelectParams& params, cudaStream_t stream) {
  if (params.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(params));
  const GateConfig& config = params.config;
  Gate gate;
  gate.m = static_cast<int>(params.m);
  gate.experts = config.n_routed_experts;
  gate.top_k = config.num_experts_per_tok;
  gate.per_lane = (gate.experts + 31) / 32;
  const bool grouped = config.n_group > 1 && config.topk_method != TopkMethod::kGreedy;
  gate.groups = grouped ? config.n_group : 1;
  gate.group_size = gate.experts / gate.groups;
  gate.kept_groups = config.topk_group;
  gate.softmax = config.scoring_func == ScoringFunc::kSoftmax;
  gate.two_best = config.topk_method == TopkMethod::kNoauxTc && gate.group_size > 1;
  gate.normalise = config.norm_topk_prob;
  gate.factor = config.routed_scaling_factor;
  gate.logits = params.logits;
  gate.bias = params.bias;
  static_assert(sizeof(ExpertId) == sizeof(uint32_t), "ids are written as integers");
  gate.ids = reinterpret_cast<uint32_t*>(params.experts);
  gate.weights = params.weights;
  if (gate.m <= kMostByGroups && FitsSelectByGroups(gate)) {
    return LaunchDependent("GateSelect", SelectByGroups, dim3(static_cast<unsigned>(gate.m)),
                           32 * static_cast<unsigned>(gate.groups), stream, gate);
  }
  const auto instance = [&](auto per_lane) {
    gate.vector_loads = gate.experts == 32 * per_lane() && per_lane() % 4 == 0 &&
                        reinterpret_cast<uintptr_t>(params.logits) % 16 == 0;
    return LaunchFor<per_lane()>(gate, stream);
  };
  if (gate.per_lane <= 1) return instance(std::integral_constant<int, 1>());
  if (gate.per_lane <= 2) return instance(std::integral_constant<int, 2>());
  if (gate.per_lane <= 5) return instance(std::integral_constant<int, 5>());
  if (gate.per_lane <= 8) return instance(std::integral_constant<int, 8>());
  if (gate.per_lane <= 12) return instance(std::integral_constant<int, 12>());
  return instance(std::integral_constant<int, 16>());
}

}  // namespace moebius::kernels::cuda
