#include "kernels/cuda/mla_attention/mla_attention.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/mla_attention/narrow_attention.cuh"
#include "kernels/cuda/mla_attention/partial.cuh"
#include "kernels/cuda/mla_attention/schedule.cuh"
#include "kernels/cuda/mla_attention/segment_cluster.cuh"
#include "kernels/cuda/mla_attention/segment_cursor.cuh"
#include "kernels/cuda/mla_attention/segment_end.cuh"
#include "kernels/cuda/mla_attention/tile.cuh"

namespace moebius::kernels::cuda {
namespace {

// One warp: keeps boxes of both buffers, and the queries, coming.
__device__ __forceinline__ void Load(Shared& s, const CUtensorMap& queries,
                                     const CUtensorMap& cache, const Shape& shape) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  MlaWorkList list(shape.schedule, Group(), s.shares);
  MlaWork work;
  uint32_t uses[2] = {0, 0}, works = 0;
  const auto load = [&](int buffer, int first, int last, int32_t block) {
#pragma unroll 1
    for (int box = first; box <= last; ++box) {
      BarrierArriveExpect(&s.full[buffer][box], kBoxBytes);
      TmaLoad2d(s.kv[buffer] + box * kBoxBytes, &cache, &s.full[buffer][box], box * 64, block * 64,
                kEvictFirst);
    }
  };
  for (; list.Next(work); ++works) {
    const int blocks = work.at.position / 64 + 1;
    const int size = shape.schedule.SegmentBlocks(work.at.position);
    const int first = work.begin * size, end = min(work.end * size, blocks);
    const int32_t* const table = shape.block_tables + work.at.sequence * shape.max_blocks;
    if (works > 0) BarrierWait(&s.q_empty, (works - 1) % 2);
    if (lane == 0) {
      BarrierArriveExpect(&s.q_full, kTileBytes);
#pragma unroll 1
      for (int box = 0; box < kBoxes; ++box) {
        TmaLoad2d(s.q + box * kBoxBytes, &queries, &s.q_full, box * 64,
                  work.row * shape.heads + Tile() * 64, kEvictFirst);
      }
    }
    __syncwarp();
    int32_t entries = 0;
    for (int block = first; block < end; ++block) {
      if ((block - first) % 32 == 0) entries = block + lane < end ? table[block + lane] : 0;
      const int32_t id = __shfl_sync(~0u, entries, (block - first) % 32);
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

// Even blocks and columns 0 .. 255.
__device__ __forceinline__ void ComputeEven(Shared& s, const Shape& shape) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int row = 16 * (thread / 32) + thread % 32 / 4;
  const uint32_t base = DescriptorBase(&s);
  SegmentCursor at(shape.schedule, Group(), s.shares);
  if (!at.Next()) return;
  uint32_t pairs = 0, works = 0;
  float scores[32];
  BarrierWait(&s.q_full, 0);
  if (at.LastOf(0) < 63) ClearBeyond(s.kv[0], s.full[0], 0, at.LastOf(0), kClear);
  Scores(scores, KMajor(base, kQ), KMajor(base, kEven), s.full[0], 0, 0, 8);
  WgmmaWait<0>();
  KeepRegisters(scores);
  if (at.blocks() > 1) NamedBarrierArrive(kScored, 256);
  for (uint32_t segments = 0;; ++segments) {
    Output o;
    MlaHeadState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float factor[2];
    bool more = true;
    SegmentEnd end;
    for (int block = 0, next = 0;; block = next) {
      const bool last = block + 2 >= at.blocks();
      if (last && at.LastOfWork()) Release(&s.q_empty);
      uint32_t p[4][4];
      Softmax(scores, p, shape.scale_log2, at.LastOf(block), state, factor, [](int) {});
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
      const bool odd = block + 1 < at.blocks();
      if (odd) {
        NamedBarrier(kOddReady, 256);
        Follow(s.anchor[1], row, state, factor);
        Rescale(o, factor);
        AddValues(o, KMajor(base, kOdd + 8 * kBoxBytes), MnMajor(base, kOdd), true);
      }
      if (last) {
        PostSums(s, segments % 2, 0, row, state);
        end = SegmentEnd::Of(at);
        more = at.Next();
        if (!more) {
          WgmmaWait<0>();
          KeepRegisters(o);
          break;
        }
        if (at.FirstOfWork()) BarrierWait(&s.q_full, ++works % 2);
        next = 0;
      } else {
        next = block + 2;
      }
      // The next scores right behind these values, also those of the next segment.
      const int last_position = at.LastOf(next);
      if (last_position < 63) {
        ClearBeyond(s.kv[0], s.full[0], pairs % 2, last_position, kClear);
      }
      Scores(scores, KMajor(base, kQ), KMajor(base, kEven), s.full[0], pairs % 2, 0, 0);
      WgmmaWait<1>();
      if (odd) Release(&s.empty[1][0]);
      Scores(scores, KMajor(base, kQ), KMajor(base, kEven), s.full[0], pairs % 2, 1, 7);
      Scores(scores, KMajor(base, kQ), KMajor(base, kEven), s.full[0], pairs % 2, 8, 8);
      WgmmaWait<1>();
      if (next + 1 < at.blocks()) NamedBarrierArrive(kScored, 256);
      KeepRegisters(o);
      if (last) break;
      WgmmaWait<0>();
      KeepRegisters(scores);
      KeepRegisters(o);
    }
    FinishSegment(s, shape, end, segments % 2, 0, row, o, state);
    WgmmaWait<0>();
    KeepRegisters(scores);
    if (!more) break;
  }
  NamedBarrier(kEvenFree, 256);
}

// Odd blocks and columns 256 .. 511.
__device__ __forceinline__ void ComputeOdd(Shared& s, const Shape& shape) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int row = 16 * (thread / 32) + thread % 32 / 4;
  const uint32_t base = DescriptorBase(&s);
  SegmentCursor at(shape.schedule, Group(), s.shares);
  uint32_t odds = 0, works = 0;
  for (uint32_t segments = 0; at.Next(); ++segments) {
    if (at.FirstOfWork()) BarrierWait(&s.q_full, works++ % 2);
    if (at.LastOfWork() && at.blocks() == 1) Release(&s.q_empty);
    Output o;
    MlaHeadState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    int block = 0;
    float factor[2];
    for (; block + 1 < at.blocks(); block += 2, ++odds) {
      float scores[32];
      const int last = at.LastOf(block + 1);
      if (last < 63) ClearBeyond(s.kv[1], s.full[1], odds % 2, last, kClear + 1);
      // The tensor cores take turns: these scores while the even block's probabilities are made.
      NamedBarrier(kScored, 256);
      Scores(scores, KMajor(base, kQ), KMajor(base, kOdd), s.full[1], odds % 2, 0, 8);
      NamedBarrier(kEvenReady, 256);
      Follow(s.anchor[0], row, state, factor);
      WgmmaWait<0>();
      KeepRegisters(scores);
      KeepRegisters(o);
      if (block > 0) Rescale(o, factor);
      if (block + 3 >= at.blocks() && at.LastOfWork()) Release(&s.q_empty);
      uint32_t p[4][4];
      // A warp that issues a product stands still until the tensor cores take it, and the other
      // half waits for these probabilities: the values of the even block go in step by step.
      const uint32_t even_p = Uniform(KMajor(base, kP));
      const uint32_t even_v = Uniform(MnMajor(base, kEven + 4 * kBoxBytes));
      WgmmaFence();
      Softmax(scores, p, shape.scale_log2, last, state, factor, [&](int step) {
        if (step < kStepsInSoftmax) AddValuesStep(o, even_p, even_v, step, block > 0);
      });
      NamedBarrier(kClear + 1, 128);  // all have read the rope keys
      StoreProbabilities(s.kv[1] + 8 * kBoxBytes, p);
      if (thread % 4 == 0) {
        s.anchor[1][row] = state.anchor[0];
        s.anchor[1][row + 8] = state.anchor[1];
      }
      ProxyFence();
      NamedBarrierArrive(kOddReady, 256);
#pragma unroll
      for (int step = kStepsInSoftmax; step < 4; ++step) {
        AddValuesStep(o, even_p, even_v, step, block > 0);
      }
      WgmmaCommit();
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
    if (block < at.blocks()) {  // an even block without an odd one
      NamedBarrier(kEvenReady, 256);
      Follow(s.anchor[0], row, state, factor);
      if (block > 0) Rescale(o, factor);
      AddValues(o, KMajor(base, kP), MnMajor(base, kEven + 4 * kBoxBytes), block > 0);
      WgmmaWait<0>();
      KeepRegisters(o);
      Release(&s.empty[0][1]);
      NamedBarrierArrive(kEvenFree, 256);
    }
    PostSums(s, segments % 2, 1, row, state);
    FinishSegment(s, shape, SegmentEnd::Of(at), segments % 2, 1, row, o, state);
  }
}

// One CTA for each 64 heads of a group.
__global__ void __launch_bounds__(kThreads, 1)
    MlaAttention(const __grid_constant__ CUtensorMap queries,
                 const __grid_constant__ CUtensorMap cache, const __grid_constant__ Shape shape) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = static_cast<int>(threadIdx.x) / 32;
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
  WaitForPrecedingKernel();
  LetNextKernelStart();  // it finds room as our CTAs end, and waits for them
  MakeShares(shape.schedule, Group(), s.shares);
  if (warp >= 8) {
    RegistersDown<kLoadRegisters>();
    if (warp == 8) Load(s, queries, cache, shape);
  } else {
    RegistersUp<kComputeRegisters>();
    if (warp < 4) {
      ComputeEven(s, shape);
    } else {
      ComputeOdd(s, shape);
    }
  }
}

constexpr int kMergeCtas = 132 * 4;

// The places of rows that several groups shared, in order; returns how many. All threads.
__device__ __forceinline__ int ListSharedRows(const MlaSchedule& schedule, const MlaShares& shares,
                                              const int (&first_slots)[kMaxSplitRows],
                                              int (&places)[kMaxSplitRows]) {
  __shared__ int warp_counts[kMaxSplitRows / 32];
  const int t = static_cast<int>(threadIdx.x);
  const bool mine = t < schedule.m && shares.split && first_slots[t] >= 0;
  const uint32_t votes = __ballot_sync(~0u, mine);
  if (t % 32 == 0) warp_counts[t / 32] = __popc(votes);
  __syncthreads();
  int before = 0, count = 0;
#pragma unroll
  for (int warp = 0; warp < kMaxSplitRows / 32; ++warp) {
    if (warp == t / 32) before = count;
    count += warp_counts[warp];
  }
  if (mine) places[before + __popc(votes & ((1u << t % 32) - 1))] = t;
  __syncthreads();
  return count;
}

// Merges the segments of rows that several groups shared.
__global__ void __launch_bounds__(kMaxSplitRows)
    MergeSegments(const __grid_constant__ Shape shape) {
  __shared__ MlaShares shares;
  __shared__ int first_slots[kMaxSplitRows], places[kMaxSplitRows];
  // The rows are read before the wait: the kernel in front has waited for them, and let this one
  // start only then.
  MakeShares(shape.schedule, 0, shares, first_slots);
  const int count = ListSharedRows(shape.schedule, shares, first_slots, places);
  const int items = count * shape.tiles * kPartialQuads;
  // Often there are none. CTAs without one find room while the kernel in front runs, and should not
  // stay: the next kernel would wait for all of them. One waits, so that this kernel ends last.
  if (blockIdx.x > 0 && static_cast<int>(blockIdx.x) >= items) return;
  WaitForPrecedingKernel();
  LetNextKernelStart();
  const int half = static_cast<int>(threadIdx.x) / 128,
            thread = static_cast<int>(threadIdx.x) % 128;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const int quad = item % kPartialQuads;
    const int tile = item / kPartialQuads % shape.tiles;
    const int place = places[item / kPartialQuads / shape.tiles];
    const int row = shape.schedule.RowAt(place);
    const int size = shape.schedule.SegmentBlocks(shape.schedule.rows[row].position);
    const int segments =
        (shares.first_block[place + 1] - shares.first_block[place] + size - 1) / size;
    MergeQuads(shape, row, tile, first_slots[place], segments, half, quad, thread);
  }
}

constexpr int64_t kMostPartialBytes = int64_t{1} << 29;

struct Plan {
  int tiles, groups, max_segments;
  int slots;
  int64_t workspace_bytes;
};

// At a border of two groups one row is shared, so at most `groups` rows are; their segments have
// slots in a bounded workspace. How many there are only the device knows: where they are more than
// the slots it deals out whole rows. More rows than kMaxSplitRows are so dealt out in any case, but
// ask for the same workspace, which then serves any smaller call.
Plan MakePlan(int64_t m, int64_t num_heads, int64_t max_context, int64_t segment_tokens) {
  Plan plan;
  plan.tiles = static_cast<int>((num_heads + 63) / 64);
  plan.groups = MultiprocessorCount() / plan.tiles;
  const auto segments = [&](int64_t context) {
    const int64_t size =
        segment_tokens > 0 ? segment_tokens : MlaSegmentTokens(num_heads, context - 1);
    return static_cast<int>((context + size - 1) / size);
  };
  plan.max_segments = segments(max_context);  // more than of any shorter one
  const int64_t slot_bytes = plan.tiles * kPartialBytes;
  const int64_t slots = std::min(std::min<int64_t>(m, plan.groups) * plan.max_segments,
                                 kMostPartialBytes / slot_bytes);
  plan.slots = m <= kMaxSplitRows ? static_cast<int>(slots) : 0;
  plan.workspace_bytes = (plan.groups + slots) * slot_bytes;
  return plan;
}

int SegmentCtas(const Plan& plan, int64_t m) {
  const int64_t segments = m * plan.max_segments;
  return segments <= plan.slots ? ClusterCtas(segments * plan.tiles) : 1;
}

absl::Status Validate(const MlaAttentionCoreParams& p, int64_t segment_tokens) {
  constexpr const char* kOp = "MlaAttention";
  constexpr int64_t kMost = int64_t{1} << 22;  // rows of q and of the cache are int32
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, kMost));
  RETURN_IF_ERROR(CheckRange(kOp, "num_heads", p.num_heads, 1, kMlaMaxHeads));
  RETURN_IF_ERROR(CheckRange(kOp, "num_blocks", p.num_blocks, 1, kMost));
  RETURN_IF_ERROR(CheckRange(kOp, "max_context", p.max_context, 1, kMost));
  RETURN_IF_ERROR(CheckRange(kOp, "max_blocks", p.max_blocks, (p.max_context + 63) / 64, kMost));
  RETURN_IF_ERROR(CheckRange(kOp, "segment_tokens", segment_tokens, 0, kMost));
  if (segment_tokens % 128 != 0)
    return Refuse(
        kOp, absl::StrCat("segment_tokens is ", segment_tokens, ", not whole pairs of blocks"));
  if (!(p.softmax_scale > 0) || p.softmax_scale > 1e30f)
    return Refuse(kOp, absl::StrCat("softmax_scale is ", p.softmax_scale));
  RETURN_IF_ERROR(CheckPointer(kOp, "q", p.q, 16));
  RETURN_IF_ERROR(CheckPointer(kOp, "cache", p.cache, 16));
  RETURN_IF_ERROR(CheckPointer(kOp, "workspace", p.workspace, 16));
  RETURN_IF_ERROR(CheckPointer(kOp, "rows", p.rows, alignof(MlaRow)));
  RETURN_IF_ERROR(CheckPointer(kOp, "block_tables", p.block_tables, 4));
  return CheckPointer(kOp, "out", p.out, 4);
}

}  // namespace

int64_t MlaAttentionWorkspaceBytesWithSegments(int64_t m, int64_t num_heads, int64_t max_context,
                                               int64_t segment_tokens) {
  return MakePlan(m, num_heads, max_context, segment_tokens).workspace_bytes;
}

int64_t MlaAttentionWorkspaceBytes(int64_t m, int64_t num_heads, int64_t max_context) {
  return MlaAttentionWorkspaceBytesWithSegments(m, num_heads, max_context, 0);
}

int MlaSegmentCtas(int64_t m, int64_t num_heads, int64_t max_context) {
  return SegmentCtas(MakePlan(m, num_heads, max_context, 0), m);
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
  const int ctas = SegmentCtas(plan, p.m);
  const bool narrow = ctas == 1 && p.num_heads <= kNarrowHeads;
  MatrixMap map;
  map.element_bytes = 2;
  map.cols = kMlaLatentDim;
  map.row_stride_bytes = 2 * kMlaLatentDim;
  map.box_cols = 64;
  map.l2_promotion = false;  // what a box leaves out, the next one asks for anyway
  map.base = p.q;
  map.box_rows = narrow ? kNarrowHeads : 64;
  map.rows = static_cast<uint64_t>(p.m * p.num_heads);
  ASSIGN_OR_RETURN(const CUtensorMap queries, EncodeMatrixMap(map));
  map.base = p.cache;
  map.box_rows = 64;
  map.rows = static_cast<uint64_t>(p.num_blocks * 64);
  ASSIGN_OR_RETURN(const CUtensorMap cache, EncodeMatrixMap(map));

  Shape shape;
  shape.schedule = {static_cast<int>(p.m),
                    plan.groups,
                    static_cast<int>(p.num_heads),
                    static_cast<int>(segment_tokens / 64),
                    plan.slots,
                    p.rows};
  shape.heads = static_cast<int>(p.num_heads);
  shape.tiles = plan.tiles;
  shape.block_tables = p.block_tables;
  shape.max_blocks = p.max_blocks;
  shape.scale_log2 = p.softmax_scale * 1.44269504f;
  shape.out = reinterpret_cast<uint16_t*>(p.out);
  shape.chains = static_cast<float4*>(p.workspace);
  shape.segments = shape.chains + plan.groups * plan.tiles * 2 * kPartialHalf;
  shape.max_segments = plan.max_segments;

  if (ctas > 1) return LaunchSegmentClusters(ctas, queries, cache, shape, stream);
  if (narrow) {
    RETURN_IF_ERROR(LaunchNarrowAttention(queries, cache, shape, stream));
  } else {
    LaunchShape launch;
    launch.grid = dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.groups));
    launch.threads = kThreads;
    launch.shared_bytes = static_cast<int>(sizeof(Shared));
    launch.overlaps = true;
    RETURN_IF_ERROR(Launch("MlaAttention", MlaAttention, launch, stream, queries, cache, shape));
  }
  if (plan.slots == 0 || plan.max_segments == 1) return absl::OkStatus();
  const int64_t items = p.m * plan.tiles * kPartialQuads;
  return LaunchDependent("MergeSegments", MergeSegments,
                         dim3(static_cast<unsigned>(std::min<int64_t>(items, kMergeCtas))),
                         kMaxSplitRows, stream, shape);
}

absl::Status LaunchMlaAttention(const MlaAttentionCoreParams& params, cudaStream_t stream) {
  return LaunchMlaAttentionWithSegments(params, 0, stream);
}

}  // namespace moebius::kernels::cuda
