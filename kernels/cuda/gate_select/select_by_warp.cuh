#pragma once

// Choosing by one warp a token, each lane a run of neighbouring experts: for any configuration.

#include <cstdint>

#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/gate_select/gate.cuh"

namespace moebius::kernels::cuda {

constexpr int kMostFinalists = 64;

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
  Chosen chosen;
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
    ChooseOneByOne(gate, lane, keys, score, memory.chosen);
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
      memory.chosen.ids[slot] = memory.finalist_ids[mine];
      memory.chosen.scores[slot] = memory.finalist_scores[mine];
    }
    slots += __popc(winners);
  }
}

// One warp a token: for any configuration.
template <int kPerLane, int kWarps, bool kAnyGroups>
__global__ void __launch_bounds__(32 * kWarps) SelectByWarp(const Gate gate) {
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
  WaitForPrecedingKernel();
  // The next kernel's CTAs would be in the way of this one's if there are many.
  if (kWarps == 1) LetNextKernelStart();
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
  WriteChosen(gate, token, lane, memory.chosen);
}

}  // namespace moebius::kernels::cuda
