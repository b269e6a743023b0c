#pragma once

// What both ways to choose share: the configuration, the order of choice values, the scores, and
// what becomes of a choice.

#include <cstdint>

#include "kernels/cuda/device/exp.cuh"
#include "kernels/cuda/device/ordered_bits.cuh"
#include "kernels/cuda/gate_select/gate_select.h"

namespace moebius::kernels::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kMinusInfinity = -__builtin_inff();

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

// The experts that a token chose, in ascending order, and their scores.
struct alignas(16) Chosen {
  uint32_t ids[kGateMaxExpertsPerToken];
  float scores[kGateMaxExpertsPerToken];
};

// By a whole warp.
__device__ __forceinline__ void WriteChosen(const Gate& gate, int token, int lane,
                                            const Chosen& chosen) {
  __syncwarp();
  if (lane >= gate.top_k) return;
  float weight = chosen.scores[lane];
  if (gate.normalise) {
    float sum = 0.0f;
    for (int j = 0; j < gate.top_k; ++j) sum = __fadd_rn(sum, chosen.scores[j]);
    weight = __fdiv_rn(weight, __fadd_rn(sum, 1e-20f));
  }
  const int64_t at = static_cast<int64_t>(token) * gate.top_k + lane;
  gate.ids[at] = chosen.ids[lane];
  gate.weights[at] = __fmul_rn(weight, gate.factor);
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

// Chooses the top_k largest keys one by one: for rows where almost all is equal. Lane l holds those
// of the experts from l * gate.per_lane on; 0 is none.
template <int kPerLane>
__device__ __forceinline__ void ChooseOneByOne(const Gate& gate, int lane,
                                               const uint32_t (&keys)[kPerLane],
                                               const float (&score)[kPerLane], Chosen& result) {
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
    result.ids[slot] = static_cast<uint32_t>(lane * gate.per_lane + j);
    result.scores[slot++] = score[j];
  }
}

}  // namespace moebius::kernels::cuda
