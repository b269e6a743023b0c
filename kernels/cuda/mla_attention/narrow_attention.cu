#include "kernels/cuda/mla_attention/narrow_attention.cuh"

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/mla_attention/narrow_output.cuh"
#include "kernels/cuda/mla_attention/narrow_shared.cuh"
#include "kernels/cuda/mla_attention/narrow_softmax.cuh"
#include "kernels/cuda/mla_attention/schedule.cuh"
#include "kernels/cuda/mla_attention/segment_cursor.cuh"
#include "kernels/cuda/mla_attention/segment_end.cuh"

namespace moebius::kernels::cuda {
namespace {

// Where the next box goes, and how many have been asked for.
struct LoadPlace {
  RingPlace at = {0, 1};  // all is empty
  uint32_t boxes = 0;
};

// Boxes [kFirst, kEnd) of a block, by a warp. Lanes wait for a place each: to wait for one after
// the other takes longer than the copies.
template <int kFirst, int kEnd>
__device__ __forceinline__ void LoadBoxes(NarrowShared& s, const CUtensorMap& cache,
                                          LoadPlace& place, int32_t block) {
  const auto lane = threadIdx.x % 32;
  place.boxes += kEnd - kFirst;
  // It is one that has been asked for before.
  static_assert(kEnd - kFirst <= kBoxesInFlight && kBoxesInFlight < kRing);
  if (place.boxes > kBoxesInFlight) {
    const uint32_t arrived = place.boxes - kBoxesInFlight - 1;
    BarrierWait(&s.full[arrived % kRing], arrived / kRing % 2);
  }
  if (lane < kEnd - kFirst) {
    const RingPlace mine = place.at.Plus(lane);
    BarrierWait(&s.empty[mine.slot], mine.parity);
    BarrierArriveExpect(&s.full[mine.slot], kBoxBytes);
  }
  __syncwarp();
#pragma unroll
  for (int box = kFirst; box < kEnd; ++box, place.at.Advance(1)) {
    if (lane == 0) {
      const uint32_t slot = place.at.slot;
      TmaLoad2d(s.boxes[slot], &cache, &s.full[slot], box * 64, block * 64, kEvictFirst);
    }
  }
  __syncwarp();
}

// One warp: keeps the ring full.
__device__ __forceinline__ void LoadBlocks(NarrowShared& s, const CUtensorMap& cache,
                                           const Shape& shape) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  MlaWorkList list(shape.schedule, Group(), s.shares);
  MlaWork work;
  LoadPlace place;
  while (list.Next(work)) {
    const int blocks = work.at.position / 64 + 1;
    const int size = shape.schedule.SegmentBlocks(work.at.position);
    const int first = work.begin * size, end = min(work.end * size, blocks);
    const int32_t* const table = shape.block_tables + work.at.sequence * shape.max_blocks;
    int32_t entries = 0;
    for (int block = first; block < end; ++block) {
      if ((block - first) % 32 == 0) entries = block + lane < end ? table[block + lane] : 0;
      const int32_t id = __shfl_sync(~0u, entries, (block - first) % 32);
      // The places that one block leaves take the last boxes of a block and the first of the next.
      LoadBoxes<0, kRing % kBoxes>(s, cache, place, id);
      LoadBoxes<kRing % kBoxes, kBoxes>(s, cache, place, id);
    }
  }
}

// One warp of its own, so that blocks go on coming while queries wait for the row before.
__device__ __forceinline__ void LoadQueries(NarrowShared& s, const CUtensorMap& queries,
                                            const Shape& shape) {
  MlaWorkList list(shape.schedule, Group(), s.shares);
  MlaWork work;
  for (uint32_t works = 0; list.Next(work); ++works) {
    if (works > 0) BarrierWait(&s.q_empty, (works - 1) % 2);
    if (threadIdx.x % 32 == 0) {
      BarrierArriveExpect(&s.q_full, sizeof(s.q));
#pragma unroll 1
      for (int box = 0; box < kBoxes; ++box)
        TmaLoad2d(s.q[box], &queries, &s.q_full, box * 64, work.row * shape.heads, kEvictFirst);
    }
    __syncwarp();
  }
}

// Clears positions beyond `last` in the values of the block at `at`. Their scores may be made of
// what was there before or of zeros: the softmax does not look at them.
__device__ __forceinline__ void ClearValuesBeyond(NarrowShared& s, RingPlace at, int last) {
  const int chunks = (63 - last) * 8;
  for (int box = 0; box < kBoxes - 1; ++box, at.Advance(1)) {
    BarrierWait(&s.full[at.slot], at.parity);
    uint8_t* const rest = s.boxes[at.slot] + (last + 1) * 128;
    for (int i = static_cast<int>(threadIdx.x); i < chunks; i += 32 * kScoreWarps)
      reinterpret_cast<uint4*>(rest)[i] = make_uint4(0, 0, 0, 0);
  }
  ProxyFence();
}

// scores (+)= K Q^T over boxes [kFirst, kEnd) of the block at `place`, once all of them are there:
// a wait between products costs as much as the products of a box.
template <int kFirst, int kEnd>
__device__ __forceinline__ void ScoreBoxes(float (&scores)[8], NarrowShared& s, uint32_t base,
                                           RingPlace place) {
  const uint32_t q = Uniform(KMajor(base, 0));
  uint32_t k[kEnd - kFirst];
#pragma unroll
  for (int box = kFirst; box < kEnd; ++box) {
    const RingPlace at = place.Plus(box);
    BarrierWait(&s.full[at.slot], at.parity);
    k[box - kFirst] = Uniform(KMajor(base, kNarrowRing) + at.slot * (kBoxBytes / 16));
  }
  WgmmaFence();
#pragma unroll
  for (int box = kFirst; box < kEnd; ++box) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      WgmmaInstruction<Bf16Operands, kNarrowHeads>::Shared(
          scores, Descriptor(k[box - kFirst] + 32 / 16 * step),
          Descriptor(q + (box * kNarrowBoxBytes + 32 * step) / 16), (box | step) != 0);
    }
  }
}

// One warpgroup: scores and probabilities of every block.
__device__ __forceinline__ void ScoreBlocks(NarrowShared& s, const Shape& shape) {
  const uint32_t base = DescriptorBase(&s);
  SegmentCursor at(shape.schedule, Group(), s.shares);
  RingPlace place;
  uint32_t works = 0, blocks = 0;
  while (at.Next()) {
    if (at.FirstOfWork()) BarrierWait(&s.q_full, works++ % 2);
    float anchor[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    for (int block = 0; block < at.blocks(); ++block, ++blocks) {
      const int last = at.LastOf(block);
      if (last < 63) ClearValuesBeyond(s, place, last);
      float scores[8];
      ScoreBoxes<0, kRing % kBoxes>(scores, s, base, place);
      ScoreBoxes<kRing % kBoxes, kBoxes>(scores, s, base, place);
      WgmmaCommit();
      const uint32_t stage = blocks % 2;
      if (blocks > 1) BarrierWait(&s.p_empty[stage], (blocks / 2 - 1) % 2);
      WgmmaWait<0>();
      KeepRegisters(scores);
      NarrowSoftmax(s, stage, scores, shape.scale_log2, last, anchor);
      Release(&s.p_full[stage]);
      Release(&s.empty[place.Plus(kBoxes - 1).slot]);  // rope keys; the other boxes are values too
      if (block + 1 == at.blocks() && at.LastOfWork()) Release(&s.q_empty);
      place.Advance(kBoxes);
    }
  }
}

// o (+)= V^T P^T of a block, of four boxes from `place` on.
__device__ __forceinline__ void AddNarrowValues(NarrowOutput& o, uint32_t base, RingPlace place,
                                                uint32_t stage, bool accumulate) {
  const uint32_t p = Uniform(KMajor(base, kNarrowP) + stage * (kNarrowBoxBytes / 16));
  WgmmaFence();
#pragma unroll
  for (int box = 0; box < 4; ++box, place.Advance(1)) {
    const uint32_t v = Uniform(KMajor(base, kNarrowRing) + place.slot * (kBoxBytes / 16));
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      WgmmaInstruction<Bf16Operands, kNarrowHeads>::SharedTransposedA(
          o[box], Descriptor(v + 2048 / 16 * step), Descriptor(p + 32 / 16 * step),
          step > 0 || accumulate);
    }
  }
  WgmmaCommit();
  WgmmaWait<0>();
#pragma unroll
  for (int box = 0; box < 4; ++box) KeepRegisters(o[box]);
}

// As Rescale (tile.cuh): multiplying by 1 is left out where all heads have it.
__device__ __forceinline__ void RescaleHeads(NarrowOutput& o, const float (&factor)[4]) {
  if (!NeedsRescale({factor[0], factor[1]}) && !NeedsRescale({factor[2], factor[3]})) return;
#pragma unroll
  for (int box = 0; box < 4; ++box) {
#pragma unroll
    for (int i = 0; i < 8; ++i) o[box][i] = __fmul_rn(o[box][i], factor[i / 4 * 2 + i % 2]);
  }
}

// A warpgroup for each half of the columns: values of every block.
__device__ __forceinline__ void AddBlocks(NarrowShared& s, const Shape& shape, int half) {
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const uint32_t base = DescriptorBase(&s);
  SegmentCursor at(shape.schedule, Group(), s.shares);
  RingPlace place = RingPlace().Plus(4 * static_cast<uint32_t>(half));
  uint32_t blocks = 0;
  NarrowOutput chain;  // the segments before, of a row that the CTA has alone
  NarrowState state;
  while (at.Next()) {
    NarrowOutput o;
    NarrowState next;
    NarrowSums sums;
    for (int block = 0; block < at.blocks(); ++block, ++blocks) {
      const uint32_t stage = blocks % 2;
      BarrierWait(&s.p_full[stage], blocks / 2 % 2);
      float factor[4];
      LoadHeads(s.factor[stage], factor);
      LoadHeads(s.anchor[stage], next.anchor);
      if (block > 0) RescaleHeads(o, factor);
      AddNarrowValues(o, base, place, stage, block > 0);
      __syncwarp();
      if (lane < 4) BarrierArrive(&s.empty[place.Plus(static_cast<uint32_t>(lane)).slot]);
      sums.AddBlock(s, stage, block);  // only now: others wait for the places
      Release(&s.p_empty[stage]);
      place.Advance(kBoxes);
    }
    sums.Totals(next.sum);
    const SegmentEnd end = SegmentEnd::Of(at);
    if (!end.whole) {
      StorePartial(Slot(shape, end.to, half), thread, o, next);
      continue;
    }
    if (end.merges) {
      MergeOutput(chain, state, o, next);
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) chain[i / 8][i % 8] = o[i / 8][i % 8];
      state = next;
    }
    if (end.last) {
      uint16_t* const row = shape.out + int64_t{end.to} * shape.heads * kMlaLatentRank;
      StoreOutput(row + 256 * half, shape.heads, thread, chain, state.sum);
    }
  }
}

__global__ void __launch_bounds__(kNarrowThreads, 1)
    NarrowAttention(const __grid_constant__ CUtensorMap queries,
                    const __grid_constant__ CUtensorMap cache,
                    const __grid_constant__ Shape shape) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  NarrowShared& s = *reinterpret_cast<NarrowShared*>(shared_bytes);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    if (SharedAddress(s.q) % 1024 != 0) __trap();
    for (int slot = 0; slot < kRing; ++slot) {
      BarrierInit(&s.full[slot], 1);
      BarrierInit(&s.empty[slot], 4);  // the warps of scores, or of half the values
    }
    for (int stage = 0; stage < 2; ++stage) {
      BarrierInit(&s.p_full[stage], kScoreWarps);
      BarrierInit(&s.p_empty[stage], kValueWarps);
    }
    BarrierInit(&s.q_full, 1);
    BarrierInit(&s.q_empty, kScoreWarps);
    BarrierInitFence();
    PrefetchTensorMap(&queries);
    PrefetchTensorMap(&cache);
  }
  WaitForPrecedingKernel();
  LetNextKernelStart();  // it finds room as our CTAs end, and waits for them
  MakeShares(shape.schedule, Group(), s.shares);
  if (warp < kScoreWarps) {
    ScoreBlocks(s, shape);
  } else if (warp < kScoreWarps + kValueWarps) {
    AddBlocks(s, shape, (warp - kScoreWarps) / 4);
  } else if (warp == kScoreWarps + kValueWarps) {
    LoadBlocks(s, cache, shape);
  } else {
    LoadQueries(s, queries, shape);
  }
}

}  // namespace

absl::Status LaunchNarrowAttention(const CUtensorMap& queries, const CUtensorMap& cache,
                                   const Shape& shape, cudaStream_t stream) {
  LaunchShape launch;
  launch.grid = dim3(1, static_cast<unsigned>(shape.schedule.groups));
  launch.threads = kNarrowThreads;
  launch.shared_bytes = static_cast<int>(sizeof(NarrowShared));
  launch.overlaps = true;
  return Launch("NarrowAttention", NarrowAttention, launch, stream, queries, cache, shape);
}

}  // namespace moebius::kernels::cuda
