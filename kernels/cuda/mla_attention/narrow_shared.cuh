#pragma once

// Shared memory of narrow_attention.cu, and what its warps hold of up to 16 heads.
//
// Both products have 16 columns, the heads: scores [64 positions, heads] = K Q^T, and output
// [64 columns of V, heads] += V^T P^T, V read transposed. A thread of a warpgroup has four heads,
//   8 j + 2 (t % 4) + e for j, e = 0, 1, in the order 2 j + e,
// and accumulators d[4 j + 2 r + e] for row 16 (t / 32) + t % 32 / 4 + 8 r.

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/mla_attention/narrow_attention.cuh"
#include "kernels/cuda/mla_attention/schedule.cuh"
#include "kernels/cuda/mla_attention/tile.cuh"

namespace moebius::kernels::cuda {

constexpr int kScoreWarps = 4, kValueWarps = 8;
constexpr int kNarrowThreads = 32 * (kScoreWarps + kValueWarps + 2);
constexpr int kRing = 25;  // boxes of 64 positions x 64 values: two blocks and most of a third
// Boxes that a CTA has asked for and that are not there yet: enough for the whole bandwidth. With
// more, some CTAs get more of it than others.
constexpr int kBoxesInFlight = 11;
constexpr int kNarrowBoxBytes = kNarrowHeads * 128;

struct NarrowShared {
  uint8_t q[kBoxes][kNarrowBoxBytes];
  uint8_t boxes[kRing][kBoxBytes];
  uint8_t p[2][kNarrowBoxBytes];  // probabilities [head][position], by parity of the block
  float largest[2][kScoreWarps][kNarrowHeads];
  float factor[2][kNarrowHeads];  // of what was summed before the block
  float anchor[2][kNarrowHeads];
  uint64_t full[kRing], empty[kRing];
  uint64_t p_full[2], p_empty[2];
  uint64_t q_full, q_empty;
  MlaShares shares;
};
static_assert(sizeof(NarrowShared) <= 232448, "shared memory of a CTA");
static_assert(sizeof(NarrowShared::q) % 1024 == 0, "swizzled rows begin at multiples of 1024");
constexpr size_t kNarrowRing = offsetof(NarrowShared, boxes), kNarrowP = offsetof(NarrowShared, p);

// A place in the ring, and the parity of the barriers there.
struct RingPlace {
  uint32_t slot = 0, parity = 0;

  __device__ __forceinline__ void Advance(uint32_t boxes) {
    slot += boxes;
    if (slot >= kRing) {
      slot -= kRing;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ RingPlace Plus(uint32_t boxes) const {
    RingPlace other = *this;
    other.Advance(boxes);
    return other;
  }
};

// The values of the thread's four heads.
__device__ __forceinline__ void LoadHeads(const float (&from)[kNarrowHeads], float (&to)[4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float2 pair =
        *reinterpret_cast<const float2*>(&from[8 * j + 2 * (static_cast<int>(threadIdx.x) % 4)]);
    to[2 * j] = pair.x;
    to[2 * j + 1] = pair.y;
  }
}
__device__ __forceinline__ void StoreHeads(float (&to)[kNarrowHeads], const float (&from)[4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    *reinterpret_cast<float2*>(&to[8 * j + 2 * (static_cast<int>(threadIdx.x) % 4)]) =
        make_float2(from[2 * j], from[2 * j + 1]);
  }
}

}  // namespace moebius::kernels::cuda
