#pragma once

// Choosing by one warp a group of experts, an expert a lane: few steps one after the other, for few
// tokens of a gate like DeepSeek-V3's. Two barriers of the block: after the groups' scores, and
// after each kept group's best experts.

#include <cstdint>

#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/gate_select/gate.cuh"

namespace moebius::kernels::cuda {

constexpr int kMostGroups = 8;

inline bool FitsSelectByGroups(const Gate& gate) {
  return !gate.softmax && gate.groups > 1 && gate.groups <= kMostGroups && gate.group_size <= 32 &&
         gate.group_size >= gate.top_k && gate.kept_groups * gate.top_k <= 32;
}

struct alignas(16) GroupsMemory {
  uint32_t keys[kMostGroups][32];  // choice values' ordered bits; 0: no expert
  float scores[kMostGroups][32];
  uint32_t group_keys[kMostGroups];
  // The top_k best of each kept group, in ascending expert; 0: none.
  uint32_t candidates[32];
  uint32_t candidate_ids[32];
  float candidate_scores[32];
  Chosen chosen;
};

// count -= a > b, by the borrow of b - a.
__device__ __forceinline__ void SubtractIfLarger(int& count, uint32_t a, uint32_t b) {
  asm("{\n.reg .u32 difference;\n"
      "sub.cc.u32 difference, %1, %2;\n"
      "subc.u32 %0, %0, 0;\n}"
      : "+r"(count)
      : "r"(b), "r"(a));
}

// How many of kCount keys come before the one that a lane holds, keys[lane % kCount]: larger ones,
// and equal ones of lower lanes (of no meaning from lane kCount on). By the whole warp.
template <int kCount>
__device__ __forceinline__ int CountAhead(const uint32_t (&keys)[kCount], uint32_t key, int lane) {
  int larger[4] = {};  // negative, and four, so that an addition does not wait for the one before
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(&keys[i]);
    SubtractIfLarger(larger[0], four.x, key);
    SubtractIfLarger(larger[1], four.y, key);
    SubtractIfLarger(larger[2], four.z, key);
    SubtractIfLarger(larger[3], four.w, key);
  }
  const int ahead = -(larger[0] + larger[1] + (larger[2] + larger[3]));
  // Without equal keys these are 0 .. kCount - 1. The search for equal ones takes a while.
  constexpr int kSumOfAll = 32 / kCount * kCount * (kCount - 1) / 2;
  if (__reduce_add_sync(kAllLanes, ahead) == kSumOfAll) return ahead;
  return ahead + __popc(__match_any_sync(kAllLanes, key) & ((1u << lane) - 1u));
}

// The sum of the two best, or the best: ordered bits of `key` over the warp.
__device__ __forceinline__ uint32_t GroupKey(const Gate& gate, uint32_t key) {
  const uint32_t first = __reduce_max_sync(kAllLanes, key);
  if (!gate.two_best) return first;
  const uint32_t holders = __ballot_sync(kAllLanes, key == first);
  const uint32_t others = __reduce_max_sync(kAllLanes, key == first ? 0 : key);
  const uint32_t second = __popc(holders) > 1 ? first : others;
  return OrderedBits(__fadd_rn(FromOrderedBits(first), FromOrderedBits(second)));
}

// REQUIRES: FitsSelectByGroups; a block of a warp a group, a token each.
static __global__ void __launch_bounds__(32 * kMostGroups) SelectByGroups(const Gate gate) {
  __shared__ GroupsMemory memory;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int token = static_cast<int>(blockIdx.x);
  const int expert = group * gate.group_size + lane;
  const bool exists = lane < gate.group_size;
  const float bias = gate.bias != nullptr && exists ? __ldg(gate.bias + expert) : 0.0f;
  if (group == 0) {
    memory.candidates[lane] = 0;
    if (lane < kMostGroups) memory.group_keys[lane] = 0;
  }
  __syncthreads();
  WaitForPrecedingKernel();  // the logits are its
  LetNextKernelStart();

  float score[1] = {0.0f};
  if (exists) score[0] = gate.logits[static_cast<int64_t>(token) * gate.experts + expert];
  Sigmoid(score);
  const float choice = gate.bias != nullptr ? __fadd_rn(score[0], bias) : score[0];
  uint32_t key = exists ? OrderedBits(choice) : 0;
  memory.keys[group][lane] = key;
  const uint32_t group_key = GroupKey(gate, key);
  if (lane == 0) memory.group_keys[group] = group_key;
  __syncthreads();

  const int ahead = CountAhead(memory.keys[group], key, lane);
  const int better = CountAhead(memory.group_keys, memory.group_keys[lane % kMostGroups], lane);
  const uint32_t kept = __ballot_sync(kAllLanes, lane < gate.groups && better < gate.kept_groups);
  const bool is_kept = (kept >> group) & 1u;
  const uint32_t lower_lanes = (1u << lane) - 1u;
  const bool is_candidate = is_kept && exists && ahead < gate.top_k;
  const uint32_t candidates = __ballot_sync(kAllLanes, is_candidate);
  if (is_candidate) {
    const int kept_before = __popc(kept & ((1u << group) - 1u));
    const int at = kept_before * gate.top_k + __popc(candidates & lower_lanes);
    memory.candidates[at] = key;
    memory.candidate_ids[at] = static_cast<uint32_t>(expert);
    memory.candidate_scores[at] = score[0];
  }
  const uint32_t least = OrderedBits(kMinusInfinity);
  __syncwarp();  // all have read the group's keys
  if (!is_kept && exists) memory.keys[group][lane] = least;
  memory.scores[group][lane] = score[0];
  __syncthreads();
  if (group > 0) return;

  key = memory.candidates[lane];
  const int before = CountAhead(memory.candidates, key, lane);
  const bool won = key > least && before < gate.top_k;
  const uint32_t winners = __ballot_sync(kAllLanes, won);
  if (__popc(winners) < gate.top_k) {
    // Not enough above -infinity: others count too, in the order of their ids.
    uint32_t keys[kMostGroups];
    float scores[kMostGroups];
#pragma unroll
    for (int j = 0; j < kMostGroups; ++j) {
      const int e = lane * gate.per_lane + j;
      const bool owned = j < gate.per_lane && e < gate.experts;
      keys[j] = owned ? memory.keys[e / gate.group_size][e % gate.group_size] : 0;
      scores[j] = owned ? memory.scores[e / gate.group_size][e % gate.group_size] : 0.0f;
    }
    ChooseOneByOne(gate, lane, keys, scores, memory.chosen);
  } else if (won) {
    const int slot = __popc(winners & lower_lanes);
    memory.chosen.ids[slot] = memory.candidate_ids[lane];
    memory.chosen.scores[slot] = memory.candidate_scores[lane];
  }
  WriteChosen(gate, token, lane, memory.chosen);
}

}  // namespace moebius::kernels::cuda
