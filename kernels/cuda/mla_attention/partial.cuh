#pragma once

// What is known of 64 heads of a row after some of its segments: for each head the anchor M, the
// sum L of 2^(score - M) and the unnormalised output A [512]. A warpgroup of 128 threads holds one
// half of the columns as the accumulator of m64n256 (kernels/cuda/device/wgmma.cuh): thread t has
// rows r = 16 (t / 32) + t % 32 / 4 and r + 8.

#include <cstdint>

#include "base/float_formats.h"
#include "kernels/cuda/device/bf16.cuh"
#include "kernels/cuda/mla_attention/mla_attention.h"

namespace moebius::kernels::cuda {

struct MlaHeadState {  // of the thread's two rows
  float anchor[2];
  float sum[2];
};

// A partial result in device memory: two halves of [33][128] float4, A then {M, M', L, L'}.
inline constexpr int kPartialQuads = 32;
inline constexpr int64_t kPartialHalf = (kPartialQuads + 1) * 128;  // in float4
inline constexpr int64_t kPartialBytes = 2 * kPartialHalf * 16;

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void StoreState(float4* half, int thread, const MlaHeadState& s) {
  half[kPartialQuads * 128 + thread] = make_float4(s.anchor[0], s.anchor[1], s.sum[0], s.sum[1]);
}
__device__ __forceinline__ MlaHeadState LoadState(const float4* half, int thread) {
  const float4 v = half[kPartialQuads * 128 + thread];
  return {{v.x, v.y}, {v.z, v.w}};
}

// How the chain of merges goes on: `chain` with the next segment's state. The output follows by
// MergeQuad with the factors.
struct MlaMergeFactors {
  float chain[2], next[2];
};
__device__ __forceinline__ MlaMergeFactors MergeState(MlaHeadState& chain,
                                                      const MlaHeadState& next) {
  MlaMergeFactors f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float anchor = fmaxf(chain.anchor[r], next.anchor[r]);
    f.chain[r] = Exp2(__fsub_rn(chain.anchor[r], anchor));
    f.next[r] = Exp2(__fsub_rn(next.anchor[r], anchor));
    chain.anchor[r] = anchor;
    chain.sum[r] = __fmaf_rn(next.sum[r], f.next[r], __fmul_rn(chain.sum[r], f.chain[r]));
  }
  return f;
}
__device__ __forceinline__ float4 MergeQuad(const MlaMergeFactors& f, float4 chain, float4 next) {
  return make_float4(__fmaf_rn(next.x, f.next[0], __fmul_rn(chain.x, f.chain[0])),
                     __fmaf_rn(next.y, f.next[0], __fmul_rn(chain.y, f.chain[0])),
                     __fmaf_rn(next.z, f.next[1], __fmul_rn(chain.z, f.chain[1])),
                     __fmaf_rn(next.w, f.next[1], __fmul_rn(chain.w, f.chain[1])));
}

// Where a thread writes: its first row of 64 heads, of which `heads` exist.
struct MlaOutput {
  uint16_t* row;  // [heads, 512], of the first head
  int heads;
};
__device__ __forceinline__ void StoreQuad(const MlaOutput& out, int half, int quad, int thread,
                                          float4 a, const float (&inverse_sum)[2]) {
  const int head = 16 * (thread / 32) + thread % 32 / 4;
  uint16_t* const to = out.row + head * kMlaLatentRank + 256 * half + 8 * quad + 2 * (thread % 4);
  if (head < out.heads) {
    *reinterpret_cast<uint32_t*>(to) =
        RoundNumbersToBf16Pair(__fmul_rn(a.x, inverse_sum[0]), __fmul_rn(a.y, inverse_sum[0]));
  }
  if (head + 8 < out.heads) {
    *reinterpret_cast<uint32_t*>(to + 8 * kMlaLatentRank) =
        RoundNumbersToBf16Pair(__fmul_rn(a.z, inverse_sum[1]), __fmul_rn(a.w, inverse_sum[1]));
  }
}

}  // namespace moebius::kernels::cuda
