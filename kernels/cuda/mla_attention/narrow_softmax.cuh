#pragma once

// Scores of a block to probabilities and their sums, for up to 16 heads: every value by the same
// operations, in the same order, as in tile.cuh.

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bf16.cuh"
#include "kernels/cuda/device/store_matrix.cuh"
#include "kernels/cuda/mla_attention/narrow_shared.cuh"

namespace moebius::kernels::cuda {

constexpr int kScoresMet = 1;  // named barrier of the warps that make scores

// Over the positions of all score warps: the largest value of each of the thread's heads. Every
// warp is here before any is in the next block but one, whose values take the same place.
__device__ __forceinline__ void LargestOfWarps(NarrowShared& s, uint32_t stage,
                                               float (&largest)[4]) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
#pragma unroll
    for (float& most : largest) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
  }
  if (threadIdx.x % 32 < 4) StoreHeads(s.largest[stage][threadIdx.x / 32], largest);
  NamedBarrier(kScoresMet, 32 * kScoreWarps);
#pragma unroll
  for (int warp = 0; warp < kScoreWarps; ++warp) {
    float others[4];
    LoadHeads(s.largest[stage][warp], others);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i] = fmaxf(largest[i], others[i]);
  }
}

// Probabilities, factors and anchors of a block go to s.p, s.factor and s.anchor; `anchor` moves
// on.
__device__ __forceinline__ void NarrowSoftmax(NarrowShared& s, uint32_t stage, float (&d)[8],
                                              float scale_log2, int last, float (&anchor)[4]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (last < 63) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (16 * warp + lane / 4 + 8 * (i % 4 / 2) > last) d[i] = -INFINITY;
    }
  }
  float largest[4], factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) largest[i] = fmaxf(d[i / 2 * 4 + i % 2], d[i / 2 * 4 + i % 2 + 2]);
  LargestOfWarps(s, stage, largest);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float next = fmaxf(anchor[i], ceilf(__fmul_rn(largest[i], scale_log2)));
    factor[i] = Exp2(__fsub_rn(anchor[i], next));
    anchor[i] = next;
  }
  uint32_t pairs[4];  // of neighbouring heads, by 2 j + r
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const x = d + 2 * i;
    const float* const at = anchor + i / 2 * 2;
    pairs[i] = RoundNumbersToBf16Pair(Exp2(__fmaf_rn(x[0], scale_log2, -at[0])),
                                      Exp2(__fmaf_rn(x[1], scale_log2, -at[1])));
  }
  // A lane names the place of 8 positions of one head.
  const int head = 8 * (lane / 16) + lane % 8, chunk = 2 * warp + lane / 8 % 2;
  StoreMatrices4Transposed(SharedAddress(s.p[stage]) + head * 128 + ((chunk ^ (head & 7)) * 16),
                           pairs[0], pairs[1], pairs[2], pairs[3]);
  if (threadIdx.x < 4) {
    StoreHeads(s.factor[stage], factor);
    StoreHeads(s.anchor[stage], anchor);
  }
  ProxyFence();
}

// Sums of a segment's probabilities. In tile.cuh a head has eight chains of sums: even and odd
// blocks have four each, those of positions 2 g and 2 g + 1 of every 8 for g = 0 .. 3. A lane makes
// two g of a head, and every warp that adds values all heads.
struct NarrowSums {
  float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};

  __device__ __forceinline__ void AddBlock(const NarrowShared& s, uint32_t stage, int block) {
    const int lane = static_cast<int>(threadIdx.x) % 32, head = lane / 2;
    const float factor = s.factor[stage][head];
    const uint8_t* const p = s.p[stage] + head * 128 + lane % 2 * 8;
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int chunk = 0; chunk < 8; ++chunk) {
      const uint2 pairs = *reinterpret_cast<const uint2*>(p + (chunk ^ (head & 7)) * 16);
      sum[0] = __fadd_rn(sum[0], __fadd_rn(LowToFloat(pairs.x), HighToFloat(pairs.x)));
      sum[1] = __fadd_rn(sum[1], __fadd_rn(LowToFloat(pairs.y), HighToFloat(pairs.y)));
    }
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      even[g] = block % 2 == 0 ? __fmaf_rn(even[g], factor, sum[g]) : __fmul_rn(even[g], factor);
      odd[g] = block % 2 == 1 ? __fmaf_rn(odd[g], factor, sum[g]) : __fmul_rn(odd[g], factor);
    }
  }
  // The totals of the thread's four heads.
  __device__ __forceinline__ void Totals(float (&sum)[4]) const {
    float parts[2] = {__fadd_rn(even[0], even[1]), __fadd_rn(odd[0], odd[1])};
#pragma unroll
    for (float& part : parts) part = __fadd_rn(part, __shfl_xor_sync(~0u, part, 1));
    const float total = __fadd_rn(parts[0], parts[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = 8 * (i / 2) + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2;
      sum[i] = __shfl_sync(~0u, total, 2 * head);
    }
  }
};

}  // namespace moebius::kernels::cuda
