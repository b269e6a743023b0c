#include <cstdint>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/exp.cuh"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/gate_select/gate_select.h"

namespace moebius::kernels::cuda {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kMinusInfinity = -__builtin_inff();
constexpr int kMostFinalists = 64;

struct Gate {
  int m;
  int experts, top_k;
  int per_lane;                         // experts of a lane: lane l has [l * per_lane, ...)
  int groups, group_size, kept_groups;  // groups == 1: no group step
  bool softmax, two_best, normalise;
  bool vector_loads;
  float factor;
  const float* logits;
  const float* bias;
  uint32_t* ids;
  float* weights;
};

// Unsigned integers in the order of the floats. NaN is placed with -infinity; 0 is below all.
__device__ __forceinline__ uint32_t OrderedBits(float value) {
  if (value != value) value = kMinusInfinity;
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 becomes +0
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float FromOrderedBits(uint32_t bits) {
  return __uint_as_float((bits & 0x80000000u) ? bits ^ 0x80000000u : ~bits);
}

// The working memory of one token where its groups do not fall on whole lanes.
struct GroupMemory {
  float choice[kGateMaxExperts];
  uint32_t score[kGateMaxExperts];  // by group, ordered bits
  bool kept[kGateMaxExperts];
};
struct alignas(16) TokenMemory {
  float exp[kGateMaxExperts];          // softmax only
  uint32_t largest[32];                // of each lane
  uint32_t finalists[kMostFinalists];  // their choice values' ordered bits, in ascending expert
  uint32_t finalist_ids[kMostFinalists];
  float finalist_scores[kMostFinalists];
  uint32_t ids[kGateMaxExpertsPerToken];
  float scores[kGateMaxExpertsPerToken];
};

// softmax(logits) of the warp's token in place; lanes' other elements are left alone.
template <int kPerLane>
__device__ __forceinline__ void Softmax(const Gate& gate, int lane, int owned,
                                        float (&score)[kPerLane], TokenMemory& memory) {
  uint32_t largest = OrderedBits(kMinusInfinity);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j < owned) largest = max(largest, OrderedBits(score[j]));
  }
  const float maximum = FromOrderedBits(__reduce_max_sync(kAllLanes, largest));
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j >= owned) continue;
    score[j] = ExactExp(__fsub_rn(score[j], maximum));
    memory.exp[lane * gate.per_lane + j] = score[j];
  }
  __syncwarp();
  float sum = 0.0f;
  for (int e = lane % 16; e < gate.experts; e += 16) sum = __fadd_rn(sum, memory.exp[e]);
#pragma unroll
  for (int width = 8; width >= 1; width /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, width));
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j < owned) score[j] = __fdiv_rn(score[j], sum);
  }
}

// Sets the choice of all groups but the best to -infinity. Groups are whole lanes, a power of two
// of them.
template <int kPerLane>
__device__ __forceinline__ void KeepBestGroups(const Gate& gate, int lane, int owned,
                                               float (&choice)[kPerLane]) {
  const int lanes = gate.group_size / gate.per_lane;
  float first = kMinusInfinity, second = kMinusInfinity;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const float value = j < owned ? choice[j] : kMinusInfinity;
    second = fmaxf(second, fminf(first, value));
    first = fmaxf(first, value);
  }
  for (int width = 1; width < lanes; width *= 2) {
    const float other_first = __shfl_xor_sync(kAllLanes, first, width);
    const float other_second = __shfl_xor_sync(kAllLanes, second, width);
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }
  const uint32_t score = OrderedBits(gate.two_best ? __fadd_rn(first, second) : first);
  const int group = lane / lanes;
  int better = 0;
#pragma unroll 8
  for (int g = 0; g < gate.groups; ++g) {
    const uint32_t other = __shfl_sync(kAllLanes, score, g * lanes);
    better += other > score || (other == score && g < group);
  }
  if (better < gate.kept_groups) return;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) choice[j] = kMinusInfinity;
}

// The same for groups of any size.
template <int kPerLane>
__device__ __forceinline__ void KeepBestGroups(const Gate& gate, int lane, int owned,
                                               float (&choice)[kPerLane], GroupMemory& memory) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j < owned) memory.choice[lane * gate.per_lane + j] = choice[j];
  }
  __syncwarp();
  for (int g = lane; g < gate.groups; g += 32) {
    float first = kMinusInfinity, second = kMinusInfinity;
    for (int i = 0; i < gate.group_size; ++i) {
      const float value = memory.choice[g * gate.group_size + i];
      second = fmaxf(second, fminf(first, value));
      first = fmaxf(first, value);
    }
    memory.score[g] = OrderedBits(gate.two_best ? __fadd_rn(first, second) : first);
  }
  __syncwarp();
  for (int g = lane; g < gate.groups; g += 32) {
    const uint32_t score = memory.score[g];
    int better = 0;
    for (int h = 0; h < gate.groups; ++h) {
      better += memory.score[h] > score || (memory.score[h] == score && h < g);
    }
    memory.kept[g] = better < gate.kept_groups;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j < owned && !memory.kept[(lane * gate.per_lane + j) / gate.group_size])
      choice[j] = kMinusInfinity;
  }
}

// How many lower lanes' counts (below 32 each) add up to, from the bits of the counts.
__device__ __forceinline__ uint32_t SumOfLowerLanes(uint32_t count, int lane, uint32_t& total) {
  const uint32_t lower = (1u << lane) - 1u;
  uint32_t before = 0;
  total = 0;
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    const uint32_t set = __ballot_sync(kAllLanes, (count >> bit) & 1u);
    before += __popc(set & lower) << bit;
    total += __popc(set) << bit;
  }
  return before;
}

// ChooseLargest one by one: for rows where almost all is equal.
template <int kPerLane>
__device__ __forceinline__ void ChooseOneByOne(const Gate& gate, int lane,
                                               const uint32_t (&keys)[kPerLane],
                                               const float (&score)[kPerLane],
                                               TokenMemory& memory) {
  uint32_t chosen = 0;
  for (int round = 0; round < gate.top_k; ++round) {
    uint32_t best = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) best = max(best, (chosen >> j) & 1u ? 0 : keys[j]);
    const uint32_t largest = __reduce_max_sync(kAllLanes, best);
    const uint32_t holders = __ballot_sync(kAllLanes, best == largest);
    if (lane != __ffs(static_cast<int>(holders)) - 1) continue;
    uint32_t equal = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) equal |= (keys[j] == largest ? 1u : 0u) << j;
    equal &= ~chosen;
    chosen |= equal & -equal;
  }
  __syncwarp();
  uint32_t all_chosen;
  uint32_t slot = SumOfLowerLanes(__popc(chosen), lane, all_chosen);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (((chosen >> j) & 1u) == 0) continue;
    memory.ids[slot] = static_cast<uint32_t>(lane * gate.per_lane + j);
    memory.scores[slot++] = score[j];
  }
}

// Writes the experts with the top_k largest choice values and their scores to `memory`, in
// ascending expert: value descending, ties to the lower expert, which is the lower lane and there
// the lower element.
//
// A value that top_k lanes' largest values reach is at most the top_k-th largest of all, so only
// values that reach it are finalists: seldom more than twice top_k. They are ranked each against
// each.
template <int kPerLane>
__device__ __forceinline__ void ChooseLargest(const Gate& gate, int lane, int owned,
                                              const float (&choice)[kPerLane],
                                              const float (&score)[kPerLane], TokenMemory& memory) {
  uint32_t keys[kPerLane];  // 0: no element
  uint32_t best = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    keys[j] = j < owned ? OrderedBits(choice[j]) : 0;
    best = max(best, keys[j]);
  }
  memory.largest[lane] = best;
  __syncwarp();
  int better = 0;
#pragma unroll
  for (int l = 0; l < 32; l += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(&memory.largest[l]);
    better += four.x > best;
    better += four.y > best;
    better += four.z > best;
    better += four.w > best;
  }
  // At least top_k lanes have fewer than top_k better ones.
  const uint32_t least = __reduce_min_sync(kAllLanes, better < gate.top_k ? best : ~0u);
  uint32_t reaching = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) reaching |= (keys[j] >= least ? 1u : 0u) << j;
  uint32_t finalists;
  uint32_t at = SumOfLowerLanes(__popc(reaching), lane, finalists);
  if (least == 0 || finalists > kMostFinalists) {
    ChooseOneByOne(gate, lane, keys, score, memory);
    return;
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (((reaching >> j) & 1u) == 0) continue;
    memory.finalists[at] = keys[j];
    memory.finalist_ids[at] = static_cast<uint32_t>(lane * gate.per_lane + j);
    memory.finalist_scores[at++] = score[j];
  }
  // Padding to a multiple of 4 is worse than any.
  if (lane < 4 && finalists + lane < kMostFinalists) memory.finalists[finalists + lane] = 0;
  __syncwarp();
  uint32_t slots = 0;  // of the finalists before
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (32 * half >= static_cast<int>(finalists)) continue;
    const int mine = lane + 32 * half;
    const bool exists = mine < static_cast<int>(finalists);
    const uint32_t key = exists ? memory.finalists[mine] : ~0u;
    int ahead = 0;
    for (int i = 0; i < static_cast<int>(finalists); i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(&memory.finalists[i]);
      // Of equals the lower is ahead: it reaches the key, the higher has to pass it.
      ahead += four.x > key - (i < mine);
      ahead += four.y > key - (i + 1 < mine);
      ahead += four.z > key - (i + 2 < mine);
      ahead += four.w > key - (i + 3 < mine);
    }
    const bool won = exists && ahead < gate.top_k;
    const uint32_t winners = __ballot_sync(kAllLanes, won);
    if (won) {
      const uint32_t slot = slots + __popc(winners & ((1u << lane) - 1u));
      memory.ids[slot] = memory.finalist_ids[mine];
      memory.scores[slot] = memory.finalist_scores[mine];
    }
    slots += __popc(winners);
  }
}

// 1 / (1 + exp(-logit)), rounded as division is.
template <int kPerLane>
__device__ __forceinline__ void Sigmoid(float (&score)[kPerLane]) {
  float largest = 0.0f;
  bool has_nan = false;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    score[j] = __fadd_rn(1.0f, ExactExp(__fsub_rn(0.0f, score[j])));
    has_nan = has_nan || score[j] != score[j];
    largest = fmaxf(largest, score[j]);
  }
  if (largest < 1.7e38f && !has_nan) {
    // What __frcp_rn does where neither operand nor result is subnormal, without its branches: the
    // approximation is within one unit, and one step of Newton's rounds correctly.
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      float inverse;
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(score[j]));
      const float error = __fmaf_rn(-score[j], inverse, 1.0f);
      score[j] = __fmaf_rn(inverse, error, inverse);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) score[j] = __frcp_rn(score[j]);
}

// One warp a token.
template <int kPerLane, int kWarps, bool kAnyGroups>
__global__ void __launch_bounds__(32 * kWarps) GateSelect(const Gate gate) {
  __shared__ TokenMemory token_memory[kWarps];
  __shared__ GroupMemory group_memory[kAnyGroups ? kWarps : 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = static_cast<int>(blockIdx.x) * kWarps + warp;
  TokenMemory& memory = token_memory[warp];
  const int first = lane * gate.per_lane;
  const int owned = max(0, min(gate.per_lane, gate.experts - first));

  float bias[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    bias[j] = gate.bias != nullptr && j < owned ? __ldg(gate.bias + first + j) : 0.0f;
  }
  // The logits come from the kernel before this one.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  // The next kernel's CTAs would be in the way of this one's if there are many.
  if (kWarps == 1) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (token >= gate.m) return;

  float score[kPerLane];
  const float* const logits = gate.logits + static_cast<int64_t>(token) * gate.experts + first;
  if (kPerLane % 4 == 0 && gate.vector_loads) {
#pragma unroll
    for (int j = 0; j < kPerLane; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(logits + j);
      score[j] = four.x;
      score[(j + 1) % kPerLane] = four.y;
      score[(j + 2) % kPerLane] = four.z;
      score[(j + 3) % kPerLane] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) score[j] = j < owned ? logits[j] : 0.0f;
  }

  if (gate.softmax) {
    Softmax(gate, lane, owned, score, memory);
  } else {
    Sigmoid(score);
  }
  float choice[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    choice[j] = gate.bias != nullptr ? __fadd_rn(score[j], bias[j]) : score[j];
    if (choice[j] != choice[j]) choice[j] = kMinusInfinity;
  }
  if (gate.groups > 1) {
    if constexpr (kAnyGroups) {
      KeepBestGroups(gate, lane, owned, choice, group_memory[warp]);
    } else {
      KeepBestGroups(gate, lane, owned, choice);
    }
  }
  ChooseLargest(gate, lane, owned, choice, score, memory);
  __syncwarp();
  if (lane >= gate.top_k) return;
  float weight = memory.scores[lane];
  if (gate.normalise) {
    float sum = 0.0f;
    for (int j = 0; j < gate.top_k; ++j) sum = __fadd_rn(sum, memory.scores[j]);
    weight = __fdiv_rn(weight, __fadd_rn(sum, 1e-20f));
  }
  const int64_t at = static_cast<int64_t>(token) * gate.top_k + lane;
  gate.ids[at] = memory.ids[lane];
  gate.weights[at] = __fmul_rn(weight, gate.factor);
}

template <int kPerLane, int kWarps, bool kAnyGroups>
absl::Status Launch(const Gate& gate, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((gate.m + kWarps - 1) / kWarps));
  config.blockDim = dim3(32 * kWarps);
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return ToStatus(cudaLaunchKernelEx(&config, GateSelect<kPerLane, kWarps, kAnyGroups>, gate),
                  "GateSelect");
}

template <int kPerLane>
absl::Status LaunchFor(const Gate& gate, cudaStream_t stream) {
  // Whole lanes of one group each, a power of two of them: no shared memory for the group step.
  const int lanes = gate.group_size / gate.per_lane;
  const bool whole_lanes = gate.group_size % gate.per_lane == 0 && (lanes & (lanes - 1)) == 0;
  if (gate.groups > 1 && !whole_lanes) return Launch<kPerLane, 4, true>(gate, stream);
  // Few tokens: each on a multiprocessor of its own.
  if (gate.m <= 528) return Launch<kPerLane, 1, false>(gate, stream);
  return Launch<kPerLane, 4, false>(gate, stream);
}

absl::Status Validate(const GateSelectParams& p) {
  const GateConfig& c = p.config;
  const auto refuse = [](const char* field, int64_t value, const char* rule) {
    return absl::InvalidArgumentError(
        absl::StrCat("GateSelect: ", field, " is ", value, ", must be ", rule));
  };
  if (p.m < 0 || p.m > INT32_MAX / kGateMaxExperts) return refuse("m", p.m, "0 .. 2^22");
  if (c.n_routed_experts < 1 || c.n_routed_experts > kGateMaxExperts)
    return refuse("n_routed_experts", c.n_routed_experts, "1 .. 512");
  if (c.num_experts_per_tok < 1 || c.num_experts_per_tok > kGateMaxExpertsPerToken)
    return refuse("num_experts_per_tok", c.num_experts_per_tok, "1 .. 16");
  if (c.num_experts_per_tok > c.n_routed_experts)
    return refuse("num_experts_per_tok", c.num_experts_per_tok, "at most n_routed_experts");
  if (c.n_group < 1 || c.n_routed_experts % c.n_group != 0)
    return refuse("n_group", c.n_group, "a divisor of n_routed_experts");
  if (c.topk_group < 1 || c.topk_group > c.n_group)
    return refuse("topk_group", c.topk_group, "1 .. n_group");
  const auto missing = [](const char* field) {
    return absl::InvalidArgumentError(absl::StrCat("GateSelect: ", field, " is null"));
  };
  if (p.logits == nullptr) return missing("logits");
  if (p.experts == nullptr) return missing("experts");
  if (p.weights == nullptr) return missing("weights");
  return absl::OkStatus();
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
