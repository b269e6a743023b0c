#pragma once

// What a warpgroup of narrow_attention.cu does with its half of a segment's output: merges it with
// the segments before, in registers, or writes it to the slot of a shared row (partial.cuh).

#include <cstdint>

#include "kernels/cuda/device/bf16.cuh"
#include "kernels/cuda/device/store_matrix.cuh"
#include "kernels/cuda/mla_attention/narrow_shared.cuh"
#include "kernels/cuda/mla_attention/partial.cuh"

namespace moebius::kernels::cuda {

// The accumulators of four boxes of 64 columns.
using NarrowOutput = float[4][8];

// What is known of the thread's four heads after some segments.
struct NarrowState {
  float anchor[4], sum[4];
};

// `chain` and `state`: the segments before, merged with `o` and `next`.
__device__ __forceinline__ void MergeOutput(NarrowOutput& chain, NarrowState& state,
                                            const NarrowOutput& o, const NarrowState& next) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    MlaHeadState merged = {{state.anchor[2 * j], state.anchor[2 * j + 1]},
                           {state.sum[2 * j], state.sum[2 * j + 1]}};
    const MlaMergeFactors factors = MergeState(
        merged,
        {{next.anchor[2 * j], next.anchor[2 * j + 1]}, {next.sum[2 * j], next.sum[2 * j + 1]}});
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      state.anchor[2 * j + e] = merged.anchor[e];
      state.sum[2 * j + e] = merged.sum[e];
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // boxes and r
        float& a = chain[i / 2][4 * j + i % 2 * 2 + e];
        a = __fmaf_rn(o[i / 2][4 * j + i % 2 * 2 + e], factors.next[e],
                      __fmul_rn(a, factors.chain[e]));
      }
    }
  }
}

// To a half of a slot, where a tile of 64 heads would have it.
__device__ __forceinline__ void StorePartial(float4* slot, int thread, const NarrowOutput& o,
                                             const NarrowState& state) {
  // Head 2 (t % 4), column 16 (t / 32) + t % 32 / 4 of the first box.
  float* const to = reinterpret_cast<float*>(slot) + thread / 32 * (2 * 128 * 4) +
                    thread % 4 * (2 * 4 * 4) + thread % 32 / 8 * 4 + thread / 4 % 2;
#pragma unroll
  for (int box = 0; box < 4; ++box) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      to[(8 * box + i % 4 / 2) * (128 * 4) + i % 2 * (4 * 4) + i / 4 * 2] = o[box][i];
  }
  if (thread >= 32) return;
  // Heads h and h + 8 share a float4, of which there are four; eight lanes know h = 2 (t % 4) + e.
  const int e = thread / 4 % 2, head = 2 * (thread % 4) + e;
  slot[kPartialQuads * 128 + 4 * head + thread / 8] =
      e == 0 ? make_float4(state.anchor[0], state.anchor[2], state.sum[0], state.sum[2])
             : make_float4(state.anchor[1], state.anchor[3], state.sum[1], state.sum[3]);
}

// `out`: the row [heads, 512], from the half's first column on.
__device__ __forceinline__ void StoreOutput(uint16_t* out, int heads, int thread,
                                            const NarrowOutput& o, const float (&sum)[4]) {
  const int lane = thread % 32;
  float inverse[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) inverse[i] = __frcp_rn(sum[i]);
  uint16_t* const to = out + 16 * (thread / 32) + 2 * (lane % 4);
#pragma unroll
  for (int box = 0; box < 4; ++box) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // pairs of heads, which become pairs of columns
      const int j = i / 2, r = i % 2, head = 8 * j + lane / 4;
      const float* const pair = o[box] + 4 * j + 2 * r;
      const uint32_t columns = TransposeMatrix(RoundNumbersToBf16Pair(
          __fmul_rn(pair[0], inverse[2 * j]), __fmul_rn(pair[1], inverse[2 * j + 1])));
      if (head < heads)
        *reinterpret_cast<uint32_t*>(to + head * kMlaLatentRank + 64 * box + 8 * r) = columns;
    }
  }
}

}  // namespace moebius::kernels::cuda
