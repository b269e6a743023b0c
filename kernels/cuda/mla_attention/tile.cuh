#pragma once

// What a warpgroup does with a tile in shared memory: scores of a block, probabilities, values. Two
// warpgroups share the blocks of a segment: one takes the scores of even blocks and columns 0 ..
// 255 of the output, the other odd blocks and columns 256 .. 511.

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bf16.cuh"
#include "kernels/cuda/device/store_matrix.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/mla_attention/partial.cuh"
#include "kernels/cuda/mla_attention/schedule.cuh"

namespace moebius::kernels::cuda {

// A tile is 64 rows (heads, or positions of a block) of 576 values: nine boxes of 64 values, each
// 64 rows of 128 swizzled bytes. The first eight hold the latent, read as keys and as values.
constexpr int kBoxes = 9;
constexpr int kBoxBytes = 64 * 128;
constexpr int kTileBytes = kBoxes * kBoxBytes;
constexpr int kThreads = 3 * 128;  // two warpgroups that compute, a warp that loads
constexpr int kComputeRegisters = 232, kLoadRegisters = 40;

// Named barriers of the two warpgroups.
constexpr int kEvenReady = 1;  // probabilities and anchors of an even block are in shared memory
constexpr int kOddReady = 2;   // the same of an odd one
constexpr int kEvenFree = 3;   // the probabilities of an even block have been used
constexpr int kSums = 8;       // to 11: sums of a segment are in shared memory, by parity and half
constexpr int kClear = 5;      // and 6: a warpgroup's own
constexpr int kScored = 7;     // the scores of an even block are all but done

struct Shared {
  uint8_t q[kTileBytes];
  uint8_t kv[2][kTileBytes];  // even and odd blocks of a segment
  // Probabilities of even blocks; those of odd blocks take the place of their rope keys.
  uint8_t p[kBoxBytes];
  float anchor[2][64];
  float sums[2][2][64];  // by parity of the segment, warpgroup
  uint64_t full[2][kBoxes];
  uint64_t empty[2][2];  // boxes 0 .. 3 and 8, boxes 4 .. 7
  uint64_t q_full, q_empty;
  MlaShares shares;
};
static_assert(sizeof(Shared) <= 232448, "shared memory of a CTA");
constexpr size_t kQ = offsetof(Shared, q), kP = offsetof(Shared, p);
constexpr size_t kEven = offsetof(Shared, kv), kOdd = kEven + kTileBytes;

struct Shape {
  MlaSchedule schedule;
  int heads, tiles;  // tiles of 64 heads
  const int32_t* block_tables;
  int64_t max_blocks;
  float scale_log2;  // softmax_scale * log2(e)
  uint16_t* out;
  float4* chains;    // [CTAs] partial results
  float4* segments;  // [slots, tiles] partial results of segments of shared rows
  int max_segments;
};

// The grid is [groups][tiles].
__device__ __forceinline__ int Group() { return static_cast<int>(blockIdx.y); }
__device__ __forceinline__ int Tile() { return static_cast<int>(blockIdx.x); }

// Steps of the even block's values that the odd half issues within its softmax; the others follow.
constexpr int kStepsInSoftmax = 2;

// A warpgroup's accumulators: one half of the columns for 64 heads.
using Output = float[128];

// Descriptors differ in their low words only. A low word that the compiler knows to be the same in
// all lanes goes to uniform registers, which wgmma reads; else dozens are kept in others.
__device__ __forceinline__ uint64_t Descriptor(uint32_t low) {
  return (uint64_t{0x40000000 | (1024 >> 4)} << 32) | low;
}
// Where `s` lies, in units of 16 bytes. Higher bits of an address name a CTA of a cluster.
__device__ __forceinline__ uint32_t DescriptorBase(const void* s) {
  return (SharedAddress(s) & 0x3ffff) / 16;
}
__device__ __forceinline__ uint32_t Uniform(uint32_t low) { return __shfl_sync(~0u, low, 0); }
// Low words for what lies `offset` bytes into shared memory that begins at 16 * base.
__device__ __forceinline__ uint32_t KMajor(uint32_t base, size_t offset) {
  return base + static_cast<uint32_t>(offset / 16 + (1 << 16));
}
__device__ __forceinline__ uint32_t MnMajor(uint32_t base, size_t offset) {
  return base + static_cast<uint32_t>(offset / 16 + (kBoxBytes / 16 << 16));
}

// scores (+)= Q K^T over boxes [first, last], each as soon as it is there.
__device__ __forceinline__ void Scores(float (&scores)[32], uint32_t q, uint32_t k, uint64_t* full,
                                       uint32_t parity, int first, int last) {
  q = Uniform(q);
  k = Uniform(k);
#pragma unroll
  for (int box = first; box <= last; ++box) {
    BarrierWait(&full[box], parity);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t offset = (box * kBoxBytes + 32 * step) / 16;
      WgmmaInstruction<Bf16Operands, 64>::Shared(scores, Descriptor(q + offset),
                                                 Descriptor(k + offset), (box | step) != 0);
    }
  }
  WgmmaCommit();
}

// Clears positions beyond `last` of the block in `tile`, so that nothing there reaches a product.
__device__ __forceinline__ void ClearBeyond(uint8_t* tile, uint64_t* full, uint32_t parity,
                                            int last, int barrier) {
  for (int box = 0; box < kBoxes; ++box) BarrierWait(&full[box], parity);
  const int chunks = (63 - last) * 8;
  for (int box = 0; box < kBoxes; ++box) {
    for (int i = static_cast<int>(threadIdx.x) % 128; i < chunks; i += 128) {
      *reinterpret_cast<uint4*>(tile + box * kBoxBytes + (last + 1) * 128 + i * 16) =
          make_uint4(0, 0, 0, 0);
    }
  }
  ProxyFence();
  NamedBarrier(barrier, 128);
}

// The largest score of each of the thread's two rows, in units of log2 and rounded up. Positions of
// the block beyond `last` become -infinity.
__device__ __forceinline__ void LargestScores(float (&scores)[32], float scale_log2, int last,
                                              float (&largest)[2]) {
  const int column = 2 * (static_cast<int>(threadIdx.x) % 4);
  if (last < 63) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (8 * (i / 4) + column + i % 2 > last) scores[i] = -INFINITY;
    }
  }
  // Both rows step by step: their chains of latencies overlap.
  float most[2][8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      most[r][j] = fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]);
  }
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) most[r][j] = fmaxf(most[r][j], most[r][j + half]);
    }
  }
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      most[r][0] = fmaxf(most[r][0], __shfl_xor_sync(~0u, most[r][0], lanes));
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) largest[r] = ceilf(__fmul_rn(most[r][0], scale_log2));
}

// The factor of what was summed so far, when `largest` comes to the rows; `anchor` moves on.
__device__ __forceinline__ void MoveAnchors(const float (&largest)[2], float (&anchor)[2],
                                            float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float next = fmaxf(anchor[r], largest[r]);
    factor[r] = Exp2(__fsub_rn(anchor[r], next));
    anchor[r] = next;
  }
}

// Probabilities in BF16, as the operand A of four k16, and the thread's part of their sums.
// `between(0)` to `between(3)` are called along the way: to issue products.
template <typename Between>
__device__ __forceinline__ void Probabilities(const float (&scores)[32], uint32_t (&p)[4][4],
                                              float scale_log2, const float (&anchor)[2],
                                              float (&sum)[2], Between between) {
  // The sum is of the rounded values, so that a rounding error cancels where one position has most
  // of the weight.
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j % 2 == 0) between(j / 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const x = scores + 4 * j + 2 * r;
      const uint32_t pair = RoundNumbersToBf16Pair(Exp2(__fmaf_rn(x[0], scale_log2, -anchor[r])),
                                                   Exp2(__fmaf_rn(x[1], scale_log2, -anchor[r])));
      p[j / 2][j % 2 * 2 + r] = pair;
      sum[r] = __fadd_rn(
          sum[r], __fadd_rn(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)));
    }
  }
}

// Scores of a block to probabilities; positions beyond `last` weigh exactly 0. `factor` is what
// sums so far must be multiplied with; state moves on.
template <typename Between>
__device__ __forceinline__ void Softmax(float (&scores)[32], uint32_t (&p)[4][4], float scale_log2,
                                        int last, MlaHeadState& state, float (&factor)[2],
                                        Between between) {
  float largest[2], sum[2];
  LargestScores(scores, scale_log2, last, largest);
  MoveAnchors(largest, state.anchor, factor);
  Probabilities(scores, p, scale_log2, state.anchor, sum, between);
#pragma unroll
  for (int r = 0; r < 2; ++r) state.sum[r] = __fmaf_rn(state.sum[r], factor[r], sum[r]);
}

// The other warpgroup's copy of the probabilities: a tile of 64 heads x 64 positions. A lane names
// the place of one row of 8 positions in each of four 8 x 8 matrices.
__device__ __forceinline__ void StoreProbabilities(uint8_t* to, const uint32_t (&p)[4][4]) {
  int thread = static_cast<int>(threadIdx.x) % 128;
  asm volatile("" : "+r"(thread));  // four addresses made here, not kept
  const int row = 16 * (thread / 32) + thread % 16;
  const uint32_t at = SharedAddress(to) + row * 128;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int chunk = 2 * step + thread % 32 / 16;  // of 8 positions
    StoreMatrices4(at + ((chunk ^ (row & 7)) * 16), p[step][0], p[step][1], p[step][2], p[step][3]);
  }
}

// Whether a row of the warp has a factor other than 1. Only saves work: x * 1 is x.
__device__ __forceinline__ bool NeedsRescale(const float (&factor)[2]) {
  return __any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f);
}
__device__ __forceinline__ void Multiply(Output& o, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] = __fmul_rn(o[i], factor[(i % 4) / 2]);
}
__device__ __forceinline__ void Rescale(Output& o, const float (&factor)[2]) {
  if (NeedsRescale(factor)) Multiply(o, factor);
}

// o += P V: P from registers, or from the other warpgroup through shared memory.
__device__ __forceinline__ void AddValues(Output& o, const uint32_t (&p)[4][4], uint32_t v,
                                          bool accumulate) {
  v = Uniform(v);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    WgmmaInstruction<Bf16Operands, 256>::RegistersTransposedB(
        o, p[step], Descriptor(v + 2048 / 16 * step), step > 0 || accumulate);
  }
  WgmmaCommit();
}
// One of four steps; p and v uniform.
__device__ __forceinline__ void AddValuesStep(Output& o, uint32_t p, uint32_t v, int step,
                                              bool accumulate) {
  WgmmaFence();
  WgmmaInstruction<Bf16Operands, 256>::SharedTransposedB(
      o, Descriptor(p + 32 / 16 * step), Descriptor(v + 2048 / 16 * step), step > 0 || accumulate);
}
__device__ __forceinline__ void AddValues(Output& o, uint32_t p, uint32_t v, bool accumulate) {
  p = Uniform(p);
  v = Uniform(v);
#pragma unroll
  for (int step = 0; step < 4; ++step) AddValuesStep(o, p, v, step, accumulate);
  WgmmaCommit();
}

// Takes over the other warpgroup's anchors. `factor`: what sums so far must be multiplied with.
__device__ __forceinline__ void Follow(const float* anchors, int row, MlaHeadState& state,
                                       float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float anchor = anchors[row + 8 * r];
    factor[r] = Exp2(__fsub_rn(state.anchor[r], anchor));
    state.anchor[r] = anchor;
    state.sum[r] = __fmul_rn(state.sum[r], factor[r]);
  }
}

}  // namespace moebius::kernels::cuda
