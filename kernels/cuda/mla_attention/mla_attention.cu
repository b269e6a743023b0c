#include "kernels/cuda/mla_attention/mla_attention.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/mla_attention/partial.cuh"
#include "kernels/cuda/mla_attention/schedule.cuh"

namespace moebius::kernels::cuda {
namespace {

// A tile is 64 rows (heads, or positions of a block) of 576 values: nine boxes of 64 values, each
// 64 rows of 128 swizzled bytes. The first eight hold the latent, read as keys and as values.
constexpr int kBoxes = 9;
constexpr int kBoxBytes = 64 * 128;
constexpr int kTileBytes = kBoxes * kBoxBytes;
constexpr int kThreads = 3 * 128;  // two warpgroups that compute, one of which a warp loads
constexpr int kComputeRegisters = 240, kLoadRegisters = 24;

// Named barriers of the two warpgroups.
constexpr int kEvenReady = 1;  // probabilities and anchors of an even block are in shared memory
constexpr int kOddReady = 2;   // the same of an odd one
constexpr int kEvenFree = 3;   // the probabilities of an even block have been used
constexpr int kSums = 4;       // sums of a segment are in shared memory
constexpr int kClear = 5;      // and 6: a warpgroup's own

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
  float4* segments;  // [m, max_segments, tiles] partial results of shared rows
  int max_segments;
};

// A warpgroup's accumulators of one half of the output, and how they end.
using Output = float[128];

// Keeps boxes of both buffers, and the queries, coming.
__device__ __forceinline__ void Load(Shared& s, const CUtensorMap& queries,
                                     const CUtensorMap& cache, const Shape& shape, int group,
                                     int tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  MlaWorkList list(shape.schedule, group, s.shares);
  MlaWork work;
  uint32_t uses[2] = {0, 0}, works = 0;
  const auto load = [&](int buffer, int first, int last, int32_t block) {
#pragma unroll 1
    for (int box = first; box <= last; ++box) {
      BarrierArriveExpect(&s.full[buffer][box], kBoxBytes);
      TmaLoad2d(s.kv[buffer] + box * kBoxBytes, &cache, &s.full[buffer][box], box * 64, block * 64,
                kEvictNormal);
    }
  };
  for (; list.Next(work); ++works) {
    const int blocks = work.at.position / 64 + 1;
    const int first = work.begin * shape.schedule.segment_blocks;
    const int end = min(work.end * shape.schedule.segment_blocks, blocks);
    const int32_t* const table = shape.block_tables + work.at.sequence * shape.max_blocks;
    int32_t entries = 0;
    for (int block = first; block < end; ++block) {
      if ((block - first) % 32 == 0) entries = block + lane < end ? __ldg(table + block + lane) : 0;
      const int32_t id = __shfl_sync(~0u, entries, (block - first) % 32);
      if (block == first) {
        if (works > 0) BarrierWait(&s.q_empty, (works - 1) % 2);
        if (lane == 0) {
          BarrierArriveExpect(&s.q_full, kTileBytes);
#pragma unroll 1
          for (int box = 0; box < kBoxes; ++box) {
            TmaLoad2d(s.q + box * kBoxBytes, &queries, &s.q_full, box * 64,
                      work.row * shape.heads + tile * 64, kEvictNormal);
          }
        }
      }
      const int buffer = block % 2;  // segments begin at even blocks
      const uint32_t use = uses[buffer]++;
      if (use > 0) BarrierWait(&s.empty[buffer][0], (use - 1) % 2);
      if (lane == 0) load(buffer, 0, 3, id);
      if (use > 0) BarrierWait(&s.empty[buffer][1], (use - 1) % 2);
      if (lane == 0) load(buffer, 4, 8, id);
      __syncwarp();
    }
  }
}

// Descriptors differ in their low words only. A low word that the compiler knows to be the same in
// all lanes goes to uniform registers, which wgmma reads; else dozens are kept in others.
__device__ __forceinline__ uint64_t Descriptor(uint32_t low) {
  return (uint64_t{0x40000000 | (1024 >> 4)} << 32) | low;
}
__device__ __forceinline__ uint32_t Uniform(uint32_t low) {
  return __shfl_sync(~0u, low, 0);
}
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

// Scores of a block to probabilities in BF16, as the operand A of four k16; positions beyond `last`
// weigh exactly 0. `factor` is what sums so far must be multiplied with; state moves on.
__device__ __forceinline__ void Softmax(float (&scores)[32], uint32_t (&p)[4][4], float scale_log2,
                                        int last, MlaHeadState& state, float (&factor)[2]) {
  const int column = 2 * (static_cast<int>(threadIdx.x) % 4);
  if (last < 63) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (8 * (i / 4) + column + i % 2 > last) scores[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = fmaxf(scores[2 * r], scores[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < 8; ++j)
      most = fmaxf(most, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float anchor = fmaxf(state.anchor[r], ceilf(__fmul_rn(most, scale_log2)));
    factor[r] = Exp2(__fsub_rn(state.anchor[r], anchor));
    state.anchor[r] = anchor;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float& a = scores[4 * j + 2 * r];
      float& b = scores[4 * j + 2 * r + 1];
      a = Exp2(__fmaf_rn(a, scale_log2, -anchor));
      b = Exp2(__fmaf_rn(b, scale_log2, -anchor));
      sum = __fadd_rn(sum, __fadd_rn(a, b));
    }
    state.sum[r] = __fmaf_rn(state.sum[r], factor[r], sum);
  }
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[step][i] = PackBf16(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
  }
}

// The other warpgroup's copy of the probabilities: a tile of 64 heads x 64 positions.
__device__ __forceinline__ void StoreProbabilities(uint8_t* to, const uint32_t (&p)[4][4]) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int row = 16 * (thread / 32) + thread % 32 / 4;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = 2 * step + i / 2;  // of 8 positions
      const int r = row + 8 * (i % 2);
      *reinterpret_cast<uint32_t*>(to + r * 128 + ((chunk ^ (r & 7)) * 16) + 4 * (thread % 4)) =
          p[step][i];
    }
  }
}

// Multiplies by factors; where all rows of a warp have 1 there is nothing to do.
__device__ __forceinline__ void Rescale(Output& o, const float (&factor)[2]) {
  if (!__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] = __fmul_rn(o[i], factor[(i % 4) / 2]);
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
__device__ __forceinline__ void AddValues(Output& o, uint32_t p, uint32_t v, bool accumulate) {
  p = Uniform(p);
  v = Uniform(v);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    WgmmaInstruction<Bf16Operands, 256>::SharedTransposedB(
        o, Descriptor(p + 32 / 16 * step), Descriptor(v + 2048 / 16 * step),
        step > 0 || accumulate);
  }
  WgmmaCommit();
}

__device__ __forceinline__ void Release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) BarrierArrive(barrier);
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

// The end of a segment: sums of both warpgroups, then the chain of segments, or the output.
__device__ __forceinline__ void EndSegment(Shared& s, const Shape& shape, const MlaWork& work,
                                           int segment, int parity, int half, int tile, int thread,
                                           Output& o, MlaHeadState& state) {
  const int row = 16 * (thread / 32) + thread % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.sum[r] = __fadd_rn(state.sum[r], __shfl_xor_sync(~0u, state.sum[r], 1));
    state.sum[r] = __fadd_rn(state.sum[r], __shfl_xor_sync(~0u, state.sum[r], 2));
    if (thread % 4 == 0) s.sums[parity][half][row + 8 * r] = state.sum[r];
  }
  NamedBarrier(kSums, 256);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    state.sum[r] = __fadd_rn(s.sums[parity][0][row + 8 * r], s.sums[parity][1][row + 8 * r]);

  const auto quad = [&](int i) {
    return make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
  };
  const auto store = [&](float4* to) {
    StoreState(to, thread, state);
#pragma unroll
    for (int i = 0; i < kPartialQuads; ++i) to[i * 128 + thread] = quad(i);
  };
  // Addresses made here, not kept in registers through the loops.
  asm volatile("" : "+r"(thread));
  if (!work.Whole()) {
    store(shape.segments +
          ((int64_t{work.row} * shape.max_segments + segment) * shape.tiles + tile) * 2 *
              kPartialHalf +
          half * kPartialHalf);
    return;
  }
  float4* const chain = shape.chains + (int64_t{blockIdx.x} * 2 + half) * kPartialHalf;
  if (segment > 0) {
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
        const float4 merged = MergeQuad(factors, a[i], quad(i0 + i));
        o[4 * (i0 + i)] = merged.x;
        o[4 * (i0 + i) + 1] = merged.y;
        o[4 * (i0 + i) + 2] = merged.z;
        o[4 * (i0 + i) + 3] = merged.w;
      }
    }
  }
  if (segment < work.segments - 1) {
    store(chain);
    return;
  }
  const float inverse[2] = {__frcp_rn(state.sum[0]), __frcp_rn(state.sum[1])};
  const MlaOutput out{
      shape.out + (int64_t{work.row} * shape.heads + tile * 64) * kMlaLatentRank,
      min(64, shape.heads - tile * 64)};
#pragma unroll
  for (int i = 0; i < kPartialQuads; ++i) StoreQuad(out, half, i, thread, quad(i), inverse);
}

// What both warpgroups go through: every segment of every work, with `Pair(work, segment, blocks)`
// for its blocks.
struct Walk {
  int first_block;  // of the segment
  int blocks;       // of the segment
  int last_block;   // of the row's context
  int last;         // its last position
};
__device__ __forceinline__ Walk WalkSegment(const Shape& shape, const MlaWork& work, int segment) {
  Walk w;
  w.last_block = work.at.position / 64;
  w.last = work.at.position % 64;
  w.first_block = segment * shape.schedule.segment_blocks;
  w.blocks = min(shape.schedule.segment_blocks, w.last_block + 1 - w.first_block);
  return w;
}

// Even blocks and columns 0 .. 255.
__device__ __forceinline__ void ComputeEven(Shared& s, const Shape& shape, int group, int tile) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int row = 16 * (thread / 32) + thread % 32 / 4;
  const uint32_t base = SharedAddress(&s) / 16;
  MlaWorkList list(shape.schedule, group, s.shares);
  MlaWork work;
  uint32_t pairs = 0, works = 0, segments = 0;
  for (; list.Next(work); ++works) {
    BarrierWait(&s.q_full, works % 2);
    for (int segment = work.begin; segment < work.end; ++segment, ++segments) {
      const Walk walk = WalkSegment(shape, work, segment);
      Output o;
      MlaHeadState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
      float scores[32], factor[2];
      const auto last_of = [&](int block) {
        return walk.first_block + block == walk.last_block ? walk.last : 63;
      };
      if (last_of(0) < 63) ClearBeyond(s.kv[0], s.full[0], pairs % 2, walk.last, kClear);
      Scores(scores, KMajor(base, kQ), KMajor(base, kEven), s.full[0], pairs % 2, 0, 8);
      WgmmaWait<0>();
      KeepRegisters(scores);
      for (int block = 0;; block += 2) {
        uint32_t p[4][4];
        Softmax(scores, p, shape.scale_log2, last_of(block), state, factor);
        if (pairs > 0) NamedBarrier(kEvenFree, 256);
        ++pairs;
        StoreProbabilities(s.p, p);
        if (thread % 4 == 0) {
          s.anchor[0][row] = state.anchor[0];
          s.anchor[0][row + 8] = state.anchor[1];
        }
        ProxyFence();
        NamedBarrierArrive(kEvenReady, 256);
        if (block > 0) Rescale(o, factor);
        AddValues(o, p, MnMajor(base, kEven), block > 0);
        WgmmaWait<0>();
        KeepRegisters(o);
        Release(&s.empty[0][0]);
        if (block + 1 == walk.blocks) break;
        NamedBarrier(kOddReady, 256);
        Follow(s.anchor[1], row, state, factor);
        Rescale(o, factor);
        AddValues(o, KMajor(base, kOdd + 8 * kBoxBytes), MnMajor(base, kOdd), true);
        if (block + 2 == walk.blocks) {
          WgmmaWait<0>();
          KeepRegisters(o);
          Release(&s.empty[1][0]);
          break;
        }
        // The next scores right behind these values.
        if (last_of(block + 2) < 63) {
          ClearBeyond(s.kv[0], s.full[0], pairs % 2, walk.last, kClear);
        }
        Scores(scores, KMajor(base, kQ), KMajor(base, kEven), s.full[0], pairs % 2, 0, 0);
        WgmmaWait<1>();
        Release(&s.empty[1][0]);
        Scores(scores, KMajor(base, kQ), KMajor(base, kEven), s.full[0], pairs % 2, 1, 8);
        WgmmaWait<0>();
        KeepRegisters(scores);
        KeepRegisters(o);
      }
      if (segment == work.end - 1) Release(&s.q_empty);
      EndSegment(s, shape, work, segment, segments % 2, 0, tile, thread, o, state);
    }
  }
  if (pairs > 0) NamedBarrier(kEvenFree, 256);
}

// Odd blocks and columns 256 .. 511.
__device__ __forceinline__ void ComputeOdd(Shared& s, const Shape& shape, int group, int tile) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int row = 16 * (thread / 32) + thread % 32 / 4;
  const uint32_t base = SharedAddress(&s) / 16;
  MlaWorkList list(shape.schedule, group, s.shares);
  MlaWork work;
  uint32_t odds = 0, works = 0, segments = 0;
  for (; list.Next(work); ++works) {
    BarrierWait(&s.q_full, works % 2);
    for (int segment = work.begin; segment < work.end; ++segment, ++segments) {
      const Walk walk = WalkSegment(shape, work, segment);
      Output o;
      MlaHeadState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
      int block = 0;
      float factor[2];
      for (; block + 1 < walk.blocks; block += 2, ++odds) {
        float scores[32];
        const int last = walk.first_block + block + 1 == walk.last_block ? walk.last : 63;
        if (last < 63) ClearBeyond(s.kv[1], s.full[1], odds % 2, last, kClear + 1);
        Scores(scores, KMajor(base, kQ), KMajor(base, kOdd), s.full[1], odds % 2, 0, 8);
        WgmmaWait<0>();
        KeepRegisters(scores);
        NamedBarrier(kEvenReady, 256);
        Follow(s.anchor[0], row, state, factor);
        if (block > 0) Rescale(o, factor);
        AddValues(o, KMajor(base, kP), MnMajor(base, kEven + 4 * kBoxBytes), block > 0);
        uint32_t p[4][4];
        Softmax(scores, p, shape.scale_log2, last, state, factor);
        NamedBarrier(kClear + 1, 128);  // all have read the rope keys
        StoreProbabilities(s.kv[1] + 8 * kBoxBytes, p);
        if (thread % 4 == 0) {
          s.anchor[1][row] = state.anchor[0];
          s.anchor[1][row + 8] = state.anchor[1];
        }
        ProxyFence();
        NamedBarrierArrive(kOddReady, 256);
        WgmmaWait<0>();
        KeepRegisters(o);
        Release(&s.empty[0][1]);
        NamedBarrierArrive(kEvenFree, 256);
        Rescale(o, factor);
        AddValues(o, p, MnMajor(base, kOdd + 4 * kBoxBytes), true);
        WgmmaWait<0>();
        KeepRegisters(o);
        Release(&s.empty[1][1]);
      }
      if (block < walk.blocks) {  // an even block without an odd one
        NamedBarrier(kEvenReady, 256);
        Follow(s.anchor[0], row, state, factor);
        if (block > 0) Rescale(o, factor);
        AddValues(o, KMajor(base, kP), MnMajor(base, kEven + 4 * kBoxBytes), block > 0);
        WgmmaWait<0>();
        KeepRegisters(o);
        Release(&s.empty[0][1]);
        NamedBarrierArrive(kEvenFree, 256);
      }
      if (segment == work.end - 1) Release(&s.q_empty);
      EndSegment(s, shape, work, segment, segments % 2, 1, tile, thread, o, state);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    MlaAttention(const __grid_constant__ CUtensorMap queries,
                 const __grid_constant__ CUtensorMap cache, const __grid_constant__ Shape shape) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = static_cast<int>(blockIdx.x) / shape.tiles;
  const int tile = static_cast<int>(blockIdx.x) % shape.tiles;
  if (threadIdx.x == 0) {
    if (SharedAddress(s.q) % 1024 != 0) __trap();
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int box = 0; box < kBoxes; ++box) BarrierInit(&s.full[buffer][box], 1);
      for (int part = 0; part < 2; ++part) BarrierInit(&s.empty[buffer][part], 4);
    }
    BarrierInit(&s.q_full, 1);
    BarrierInit(&s.q_empty, 8);
    BarrierInitFence();
    PrefetchTensorMap(&queries);
    PrefetchTensorMap(&cache);
  }
  // MergeSegments may take over multiprocessors as they become free.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (shape.schedule.split) MakeShares(shape.schedule, s.shares);
  __syncthreads();
  if (warp >= 8) {
    RegistersDown<kLoadRegisters>();
    if (warp == 8) Load(s, queries, cache, shape, group, tile);
  } else {
    RegistersUp<kComputeRegisters>();
    if (warp < 4) {
      ComputeEven(s, shape, group, tile);
    } else {
      ComputeOdd(s, shape, group, tile);
    }
  }
}

constexpr int kMergeQuads = 2;     // of a thread
constexpr int kMergeCtas = 132 * 4;

// Merges the segments of rows that several groups shared.
__global__ void __launch_bounds__(kMaxSplitRows) MergeSegments(const __grid_constant__ Shape shape) {
  __shared__ MlaShares shares;
  MakeShares(shape.schedule, shares);
  asm volatile("griddepcontrol.wait;" ::: "memory");  // MlaAttention is done, its results visible
  const int half = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  constexpr int kChunks = kPartialQuads / kMergeQuads;
  const int items = shape.schedule.m * shape.tiles * kChunks;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const int quad0 = item % kChunks * kMergeQuads;
    const int tile = item / kChunks % shape.tiles, row = item / kChunks / shape.tiles;
    if (!IsShared(shape.schedule, shares, row)) continue;
    const int segments = (shares.first_block[row + 1] - shares.first_block[row] +
                          shape.schedule.segment_blocks - 1) /
                         shape.schedule.segment_blocks;
    const int64_t stride = shape.tiles * 2 * kPartialHalf;
    const float4* from = shape.segments + int64_t{row} * shape.max_segments * stride +
                         (tile * 2 + half) * kPartialHalf;
    MlaHeadState state = LoadState(from, thread);
    float4 a[kMergeQuads];
#pragma unroll
    for (int i = 0; i < kMergeQuads; ++i) a[i] = from[(quad0 + i) * 128 + thread];
#pragma unroll 4
    for (int segment = 1; segment < segments; ++segment) {
      from += stride;
      const MlaMergeFactors factors = MergeState(state, LoadState(from, thread));
#pragma unroll
      for (int i = 0; i < kMergeQuads; ++i)
        a[i] = MergeQuad(factors, a[i], from[(quad0 + i) * 128 + thread]);
    }
    const float inverse[2] = {__frcp_rn(state.sum[0]), __frcp_rn(state.sum[1])};
    const MlaOutput out{shape.out + (int64_t{row} * shape.heads + tile * 64) * kMlaLatentRank,
                        min(64, shape.heads - tile * 64)};
#pragma unroll
    for (int i = 0; i < kMergeQuads; ++i)
      StoreQuad(out, half, quad0 + i, thread, a[i], inverse);
  }
}

constexpr int64_t kMostPartialBytes = int64_t{1} << 29;

struct Plan {
  int tiles, groups, max_segments;
  bool split;
  int64_t workspace_bytes;
};

// Rows are shared among groups where that needs a bounded workspace.
Plan MakePlan(int64_t m, int64_t num_heads, int64_t max_context, int64_t segment_tokens) {
  Plan plan;
  plan.tiles = static_cast<int>((num_heads + 63) / 64);
  plan.groups = MultiprocessorCount() / plan.tiles;
  plan.max_segments = static_cast<int>((max_context + segment_tokens - 1) / segment_tokens);
  const int64_t partials = m * plan.max_segments * plan.tiles * kPartialBytes;
  plan.split = m <= kMaxSplitRows && partials <= kMostPartialBytes;
  plan.workspace_bytes = plan.groups * plan.tiles * kPartialBytes + (plan.split ? partials : 0);
  return plan;
}

absl::Status Validate(const MlaAttentionCoreParams& p, int64_t segment_tokens) {
  const auto bad = [](const char* field, int64_t value) {
    return absl::InvalidArgumentError(absl::StrCat("MlaAttention: ", field, " is ", value));
  };
  constexpr int64_t kMost = int64_t{1} << 22;  // rows of q and of the cache are int32
  if (p.m < 0 || p.m > kMost) return bad("m", p.m);
  if (p.num_heads < 1 || p.num_heads > kMlaMaxHeads) return bad("num_heads", p.num_heads);
  if (p.num_blocks < 1 || p.num_blocks > kMost) return bad("num_blocks", p.num_blocks);
  if (p.max_context < 1 || p.max_context > kMost) return bad("max_context", p.max_context);
  if (p.max_blocks * 64 < p.max_context) return bad("max_blocks", p.max_blocks);
  if (segment_tokens < 128 || segment_tokens % 128 != 0 || segment_tokens > kMost)
    return bad("segment_tokens", segment_tokens);
  if (!(p.softmax_scale > 0) || p.softmax_scale > 1e30f) {
    return absl::InvalidArgumentError(
        absl::StrCat("MlaAttention: softmax_scale is ", p.softmax_scale));
  }
  const auto misaligned = [](const void* pointer, size_t alignment) {
    return pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % alignment != 0;
  };
  for (const auto& [name, pointer, alignment] :
       {std::tuple<const char*, const void*, size_t>{"q", p.q, 16},
        {"cache", p.cache, 16},
        {"workspace", p.workspace, 16},
        {"rows", p.rows, alignof(MlaRow)},
        {"block_tables", p.block_tables, 4},
        {"out", p.out, 4}}) {
    if (misaligned(pointer, alignment)) {
      return absl::InvalidArgumentError(
          absl::StrCat("MlaAttention: ", name, " is null or not aligned to ", alignment));
    }
  }
  return absl::OkStatus();
}

}  // namespace

int64_t MlaAttentionWorkspaceBytesWithSegments(int64_t m, int64_t num_heads, int64_t max_context,
                                               int64_t segment_tokens) {
  return MakePlan(m, num_heads, max_context, segment_tokens).workspace_bytes;
}

int64_t MlaAttentionWorkspaceBytes(int64_t m, int64_t num_heads, int64_t max_context) {
  return MlaAttentionWorkspaceBytesWithSegments(m, num_heads, max_context, kMlaSegmentTokens);
}

absl::Status LaunchMlaAttentionWithSegments(const MlaAttentionCoreParams& p, int64_t segment_tokens,
                                            cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p, segment_tokens));
  const Plan plan = MakePlan(p.m, p.num_heads, p.max_context, segment_tokens);
  if (p.workspace_bytes < plan.workspace_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("MlaAttention: workspace_bytes is ",
                                                   p.workspace_bytes, ", needed are ",
                                                   plan.workspace_bytes));
  }
  MatrixMap map;
  map.element_bytes = 2;
  map.cols = kMlaLatentDim;
  map.row_stride_bytes = 2 * kMlaLatentDim;
  map.box_rows = map.box_cols = 64;
  map.base = p.q;
  map.rows = static_cast<uint64_t>(p.m * p.num_heads);
  ASSIGN_OR_RETURN(const CUtensorMap queries, EncodeMatrixMap(map));
  map.base = p.cache;
  map.rows = static_cast<uint64_t>(p.num_blocks * 64);
  ASSIGN_OR_RETURN(const CUtensorMap cache, EncodeMatrixMap(map));

  Shape shape;
  shape.schedule = {static_cast<int>(p.m), plan.groups, static_cast<int>(segment_tokens / 64),
                    plan.split, p.rows};
  shape.heads = static_cast<int>(p.num_heads);
  shape.tiles = plan.tiles;
  shape.block_tables = p.block_tables;
  shape.max_blocks = p.max_blocks;
  shape.scale_log2 = p.softmax_scale * 1.44269504f;
  shape.out = reinterpret_cast<uint16_t*>(p.out);
  shape.chains = static_cast<float4*>(p.workspace);
  shape.segments = shape.chains + plan.groups * plan.tiles * 2 * kPartialHalf;
  shape.max_segments = plan.max_segments;

  RETURN_IF_ERROR(ToStatus(
      cudaFuncSetAttribute(MlaAttention, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(sizeof(Shared))),
      "MlaAttention"));
  MlaAttention<<<static_cast<unsigned>(plan.groups * plan.tiles), kThreads, sizeof(Shared),
                 stream>>>(queries, cache, shape);
  RETURN_IF_ERROR(LaunchStatus("MlaAttention"));
  if (!plan.split || plan.max_segments == 1) return absl::OkStatus();
  const int64_t items = p.m * plan.tiles * (kPartialQuads / kMergeQuads);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(items, kMergeCtas)));
  config.blockDim = dim3(kMaxSplitRows);
  config.stream = stream;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = 1;
  return ToStatus(cudaLaunchKernelEx(&config, MergeSegments, shape), "MergeSegments");
}

absl::Status LaunchMlaAttention(const MlaAttentionCoreParams& params, cudaStream_t stream) {
  return LaunchMlaAttentionWithSegments(params, kMlaSegmentTokens, stream);
}

}  // namespace moebius::kernels::cuda
