#pragma once

// What a warpgroup does at the end of a segment: the sums of both, and the chain of segments of a
// row, through device memory.

#include "kernels/cuda/mla_attention/tile.cuh"

namespace moebius::kernels::cuda {
// The sum over both warpgroups, at the end of a segment.
__device__ __forceinline__ void AddSums(Shared& s, int parity, int half, int row,
                                        MlaHeadState& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.sum[r] = __fadd_rn(state.sum[r], __shfl_xor_sync(~0u, state.sum[r], 1));
    state.sum[r] = __fadd_rn(state.sum[r], __shfl_xor_sync(~0u, state.sum[r], 2));
    if (threadIdx.x % 4 == 0) s.sums[parity][half][row + 8 * r] = state.sum[r];
  }
  // Each half arrives where the other waits. A warp comes back to a parity's barriers only after
  // the other half has passed them: it has arrived at the other parity's since.
  NamedBarrierArrive(kSums + 2 * parity + half, 256);
  NamedBarrier(kSums + 2 * parity + 1 - half, 256);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    state.sum[r] = __fadd_rn(s.sums[parity][0][row + 8 * r], s.sums[parity][1][row + 8 * r]);
}

__device__ __forceinline__ float4 Quad(const Output& o, int i) {
  return make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
}

__device__ __forceinline__ void StorePartial(float4* to, int thread, const Output& o,
                                             const MlaHeadState& state) {
  StoreState(to, thread, state);
#pragma unroll
  for (int i = 0; i < kPartialQuads; ++i) to[i * 128 + thread] = Quad(o, i);
}

// Where this CTA keeps the merged segments of a row that it computes alone, and where a segment of
// a shared row goes.
__device__ __forceinline__ float4* Chain(const Shape& shape, int half) {
  return shape.chains + (int64_t{blockIdx.y * gridDim.x + blockIdx.x} * 2 + half) * kPartialHalf;
}
__device__ __forceinline__ float4* Slot(const Shape& shape, const MlaWork& work, int segment,
                                        int half) {
  return shape.segments +
         (((int64_t{work.row} * shape.max_segments + segment) * shape.tiles + Tile()) * 2 + half) *
             kPartialHalf;
}

// o and state: the segments before, merged with these.
__device__ __forceinline__ void MergeChain(const float4* chain, int thread, Output& o,
                                           MlaHeadState& state) {
  MlaHeadState before = LoadState(chain, thread);
  const MlaMergeFactors factors = MergeState(before, state);
  state = before;
#pragma unroll
  for (int i0 = 0; i0 < kPartialQuads; i0 += 8) {
    float4 a[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = chain[(i0 + i) * 128 + thread];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 merged = MergeQuad(factors, a[i], Quad(o, i0 + i));
      o[4 * (i0 + i)] = merged.x;
      o[4 * (i0 + i) + 1] = merged.y;
      o[4 * (i0 + i) + 2] = merged.z;
      o[4 * (i0 + i) + 3] = merged.w;
    }
  }
}

__device__ __forceinline__ void Release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) BarrierArrive(barrier);
}

// Whether any of the 16 heads of a warp's rows exists.
__device__ __forceinline__ bool HasHeads(const Shape& shape, int warp) {
  return 16 * warp < shape.heads - 64 * Tile();
}

// The end of a segment that is not the last of its work.
__device__ __forceinline__ void KeepSegment(const Shape& shape, const MlaWork& work, int segment,
                                            int half, Output& o, MlaHeadState& state) {
  int thread = static_cast<int>(threadIdx.x) % 128;
  asm volatile("" : "+r"(thread));  // addresses made here, not kept through the loops
  if (!HasHeads(shape, thread / 32)) return;
  const bool whole = work.Whole();
  float4* const to = whole ? Chain(shape, half) : Slot(shape, work, segment, half);
  if (whole && segment > 0) MergeChain(to, thread, o, state);
  StorePartial(to, thread, o, state);
}

// The end of the last segment of a work.
__device__ __forceinline__ void EndWork(const Shape& shape, const MlaWork& work, int segment,
                                        int half, Output& o, MlaHeadState& state) {
  int thread = static_cast<int>(threadIdx.x) % 128;
  asm volatile("" : "+r"(thread));
  if (!HasHeads(shape, thread / 32)) return;
  if (!work.Whole()) {
    StorePartial(Slot(shape, work, segment, half), thread, o, state);
    return;
  }
  if (segment > 0) MergeChain(Chain(shape, half), thread, o, state);
  const float inverse[2] = {__frcp_rn(state.sum[0]), __frcp_rn(state.sum[1])};
  const MlaOutput out{shape.out + (int64_t{work.row} * shape.heads + Tile() * 64) * kMlaLatentRank,
                      min(64, shape.heads - Tile() * 64)};
#pragma unroll
  for (int i = 0; i < kPartialQuads; ++i) StoreQuad(out, half, i, thread, Quad(o, i), inverse);
}

}  // namespace moebius::kernels::cuda
