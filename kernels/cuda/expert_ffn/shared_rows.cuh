#pragma once

// Rows of wide tiles, gathered once for all column tiles of an expert. The tile of the first column
// gathers as every tile does, by asynchronous copies, and stores each stage from shared memory to
// the workspace; tiles of other columns load from there by the copy engine, which costs the
// products beside it less. They may begin while that tile is still at work, and then stay behind
// it; one that finds nothing there yet gathers for itself. Which of these it does follows the
// timing and does not reach the bits. A warp has the same half of the rows in all of them, because
// it decides alone.

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bulk_store.cuh"
#include "kernels/cuda/expert_ffn/cta_state.cuh"

namespace moebius::kernels::cuda {

// Copies 16 bytes asynchronously, the first `bytes` from memory, zeros after them.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CopyFloatAsync(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
}
// One arrival of this thread at `barrier` once its copies so far have landed.
__device__ __forceinline__ void ArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Which warp of rows this is: read again where it is used, like ThreadRead.
__device__ __forceinline__ int RowPart() { return (ThreadRead() - kConsumers) / 32 - 1; }

// The row that packed row `row` of a tile reads.
__device__ __forceinline__ int SourceRow(const FfnArgs& args, bool down, int row) {
  return down || args.row_index == nullptr ? row : args.row_index[row];
}

// The word of gathered rows from `row` on, the first of a half; the next one is their scales'.
__device__ __forceinline__ int32_t* GatheredWord(const FfnArgs& args, int row) {
  return args.gathered + row / kHalfRows * (kGatheredWords / kRowWarps);
}
// How much of what a word stands for is in device memory: the same in all lanes.
__device__ __forceinline__ int Gathered(const int32_t* word) {
  int blocks;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(blocks) : "l"(word) : "memory");
  return __reduce_min_sync(0xffffffffu, blocks);
}
// Says so: what this thread has seen stored.
__device__ __forceinline__ void SetGathered(int32_t* word, int blocks) {
  __threadfence();
  atomicExch(word, blocks);
}

// Warp `part`: its half of the tile's rows, in the gathered rows from `row` on. `ready` blocks are
// there and the others will be: the tile that gathers them was drawn before this one.
__device__ __forceinline__ void LoadGatheredRows(const FfnArgs& args, FfnShared& shared,
                                                 StageCursor& cursor, int row, int part,
                                                 int ready) {
  GlobalProxyFence();
  constexpr int kBytes = kHalfRows * kTileK;
  row = __shfl_sync(0xffffffffu, row, 0);
  const int blocks = Blocks(args.hidden);
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    const int s = cursor.stage;
    if (block >= ready) {
      while ((ready = Gathered(GatheredWord(args, row))) <= block) __nanosleep(100);
      GlobalProxyFence();
    }
    BarrierWait(&shared.empty[s], cursor.parity ^ 1);
    if (ElectLane()) {
      BarrierArriveExpect(&shared.full[s], kBytes);
      TmaLoad2d(shared.stages[s] + kWeightBytes + part * kBytes, &args.gathered_rows,
                &shared.full[s], block * kTileK, row, kEvictNormal);
      BarrierArriveMany(&shared.full[s], 31);
    }
    __syncwarp();
    cursor.Advance();
  }
}

// Warp `part`: gathers its half of the tile's rows; with `keep` it also stores each stage, when it
// has landed, to where LoadGatheredRows finds it, the gathered rows from `kept_row` on.
__device__ __forceinline__ void GatherHalf(const FfnArgs& args, FfnShared& shared,
                                           StageCursor& cursor, const ExpertTile& tile, int part,
                                           bool keep, int kept_row) {
  constexpr int kLag = 1;     // blocks
  constexpr int kToldOf = 8;  // blocks, at once
  constexpr int kAtOnce = 4;  // rows; 8 threads copy one
  constexpr int kBytes = kHalfRows * kTileK;
  const int lane = ThreadRead() % 32, chunk = lane % 8, row_of_lane = lane / 8;
  const int first_row = tile.row + part * kHalfRows;
  const uint32_t of_part = kWeightBytes + part * kBytes;
  const uint32_t place = of_part + row_of_lane * kTileK + (chunk ^ row_of_lane) * 16;
  uint32_t offset[kHalfRows / kAtOnce];  // in 16 bytes
#pragma unroll
  for (int i = 0; i < kHalfRows / kAtOnce; ++i) {
    const int row = min(first_row + row_of_lane + i * kAtOnce, tile.row + tile.rows - 1);
    offset[i] = static_cast<uint32_t>(SourceRow(args, false, row)) *
                static_cast<uint32_t>(args.hidden / 16);
  }
  const int blocks = Blocks(args.hidden);
  const auto store = [&](int block, int s) {
    ProxyFence();
    __syncwarp();
    if (lane == 0) {
      TmaStore2d(&args.gathered_rows, shared.stages[s] + of_part, block * kTileK, kept_row);
      StoresCommit();
    }
  };
  const uint8_t* codes = args.x_codes + chunk * 16;
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    const int s = cursor.stage;
    // The store of what this stage held before has read it: at most those of later blocks have not.
    if (keep) {
      if (lane == 0) StoresHaveReadBut<kStages - 1 - kLag>();
      __syncwarp();
    }
    BarrierWait(&shared.empty[s], cursor.parity ^ 1);
    const uint32_t to = SharedAddress(shared.stages[s]) + place;
    const int bytes = block * kTileK + chunk * 16 < args.hidden ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kHalfRows / kAtOnce; ++i) {
      // Every other row is one of the lower four of a swizzled eight.
      CopyAsync((to + i * kAtOnce * kTileK) ^ (i % 2 * 64),
                codes + static_cast<uint64_t>(offset[i]) * 16, bytes);
    }
    ArriveAfterCopies(&shared.full[s]);
    asm volatile("cp.async.commit_group;" ::: "memory");
    codes += kTileK;
    cursor.Advance();
    if (keep && block >= kLag) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kLag) : "memory");
      store(block - kLag, (s + kStages - kLag) % kStages);
      if (lane == 0 && (block + 1 - kLag) % kToldOf == 0) {
        StoresDone();
        SetGathered(GatheredWord(args, kept_row), block + 1 - kLag);
      }
    }
  }
  if (!keep) return;
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#pragma unroll 1
  for (int left = min(kLag, blocks); left > 0; --left)
    store(blocks - left, (cursor.stage + kStages - left) % kStages);
  if (lane == 0) {
    StoresDone();
    SetGathered(GatheredWord(args, kept_row), blocks);
  }
  // The other warp may write to these places next.
  NamedBarrier(kRowBarrier, kRowWarps * 32);
}

}  // namespace moebius::kernels::cuda
