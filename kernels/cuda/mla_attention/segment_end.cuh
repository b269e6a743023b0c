#pragma once

// What a warpgroup does at the end of a segment: the sums of both, and the chain of segments of a
// row, through device memory.

#include "kernels/cuda/mla_attention/segment_cursor.cuh"
#include "kernels/cuda/mla_attention/tile.cuh"

namespace moebius::kernels::cuda {

// The sum over both warpgroups, at the end of a segment: each half posts its part as soon as it is
// complete and takes the other's when it needs the sum. Each half arrives where the other waits. A
// warp comes back to a parity's barriers only after the other half has passed them: it has arrived
// at the other parity's since.
__device__ __forceinline__ void PostSums(Shared& s, int parity, int half, int row,
                                         const MlaHeadState& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
    if (threadIdx.x % 4 == 0) s.sums[parity][half][row + 8 * r] = sum;
  }
  NamedBarrierArrive(kSums + 2 * parity + half, 256);
}
__device__ __forceinline__ void TakeSums(const Shared& s, int parity, int half, int row,
                                         MlaHeadState& state) {
  NamedBarrier(kSums + 2 * parity + 1 - half, 256);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    state.sum[r] = __fadd_rn(s.sums[parity][0][row + 8 * r], s.sums[parity][1][row + 8 * r]);
}

__device__ __forceinline__ float4 Quad(const Output& o, int i) {
  return make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
}

// Where this CTA keeps the merged segments of a row that it computes alone, and where a segment of
// a shared row goes.
__device__ __forceinline__ float4* Chain(const Shape& shape, int half) {
  return shape.chains + (int64_t{blockIdx.y * gridDim.x + blockIdx.x} * 2 + half) * kPartialHalf;
}
__device__ __forceinline__ float4* Slot(const Shape& shape, int slot, int half) {
  return shape.segments + ((int64_t{slot} * shape.tiles + Tile()) * 2 + half) * kPartialHalf;
}

// The output of a row, of the segments in its slots: a quad of each of 128 threads.
__device__ __forceinline__ void MergeQuads(const Shape& shape, int row, int tile, int first_slot,
                                           int segments, int half, int quad, int thread) {
  if (16 * (thread / 32) >= shape.heads - 64 * tile) return;  // no heads, and nothing stored
  const int64_t stride = shape.tiles * 2 * kPartialHalf;
  const float4* const from =
      shape.segments + first_slot * stride + (tile * 2 + half) * kPartialHalf;
  MlaHeadState state = LoadState(from, thread);
  float4 a = from[quad * 128 + thread];
  constexpr int kBatch = 8;  // loads in flight
  for (int segment = 1; segment < segments; segment += kBatch) {
    MlaHeadState next_state[kBatch];
    float4 next[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (segment + i >= segments) break;
      next_state[i] = LoadState(from + (segment + i) * stride, thread);
      next[i] = from[(segment + i) * stride + quad * 128 + thread];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (segment + i >= segments) break;
      const MlaMergeFactors factors = MergeState(state, next_state[i]);
      a = MergeQuad(factors, a, next[i]);
    }
  }
  const float inverse[2] = {__frcp_rn(state.sum[0]), __frcp_rn(state.sum[1])};
  const MlaOutput out{shape.out + (int64_t{row} * shape.heads + tile * 64) * kMlaLatentRank,
                      min(64, shape.heads - tile * 64)};
  StoreQuad(out, half, quad, thread, a, inverse);
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

struct SegmentEnd {
  __device__ __forceinline__ static SegmentEnd Of(const SegmentCursor& at) {
    const MlaWork& work = at.work();
    return {work.Whole() ? work.row : work.first_slot + at.segment(), at.segment() > 0,
            work.Whole(), at.LastOfWork()};
  }
  int to;       // the row, or the slot of the segment of a shared one
  bool merges;  // with the segments before
  bool whole;   // the CTA computes all of the row
  bool last;    // of the work
};

// What becomes of a segment's output: part of the chain, a slot of a shared row, or the row.
__device__ __forceinline__ void FinishSegment(const Shared& s, const Shape& shape,
                                              const SegmentEnd& end, int parity, int half, int row,
                                              Output& o, MlaHeadState& state) {
  int thread = static_cast<int>(threadIdx.x) % 128;
  asm volatile("" : "+r"(thread));  // addresses made here, not kept through the loops
  TakeSums(s, parity, half, row, state);
  if (!HasHeads(shape, thread / 32)) return;
  float4* const to = end.whole ? Chain(shape, half) : Slot(shape, end.to, half);
  if (end.whole && end.merges) MergeChain(to, thread, o, state);
  if (end.whole && end.last) {
    const float inverse[2] = {__frcp_rn(state.sum[0]), __frcp_rn(state.sum[1])};
    const MlaOutput out{shape.out + (int64_t{end.to} * shape.heads + Tile() * 64) * kMlaLatentRank,
                        min(64, shape.heads - Tile() * 64)};
#pragma unroll
    for (int i = 0; i < kPartialQuads; ++i) StoreQuad(out, half, i, thread, Quad(o, i), inverse);
  } else {
    StoreState(to, thread, state);
#pragma unroll
    for (int i = 0; i < kPartialQuads; ++i) to[i * 128 + thread] = Quad(o, i);
  }
}

}  // namespace moebius::kernels::cuda
