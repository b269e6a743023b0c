#pragma once

// The loading roles of a CTA: weights and requantised rows by the copy engine, rows that must be
// gathered and scales by asynchronous copies.

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/expert_ffn/cta_state.cuh"
#include "kernels/cuda/expert_ffn/shared_rows.cuh"

namespace moebius::kernels::cuda {

// One thread: draws tickets, announces tiles and keeps weights in flight, across tiles.
__device__ __forceinline__ void LoadWeights(const FfnArgs& args, FfnShared& shared, int ticket) {
  StageCursor cursor;
  const int gate_up_columns = Blocks(args.intermediate);
  const int down_columns = args.with_down ? (args.hidden + 255) / 256 : 0;
  for (uint32_t count = 0;; ++count) {
    const ExpertTile tile =
        shared.list.Find(ticket, args.num_experts, gate_up_columns, down_columns);
    const int entry = static_cast<int>(count % kTileEntries);
    BarrierWait(&shared.taken[entry], (count / kTileEntries) % 2 ^ 1);
    shared.tiles[entry] = tile;
    for (int32_t& by_engine : shared.by_engine[entry]) by_engine = 0;
    BarrierArrive(&shared.announced[entry]);
    if (tile.kind == TileKind::kStop) return;
    const bool down = tile.kind == TileKind::kDown;
    const ExpertEntry& expert = args.experts[tile.expert];
    const CUtensorMap* const first = down ? &expert.down : &expert.gate;
    const CUtensorMap* const second = down ? &expert.down : &expert.up;
    const int second_column = tile.column + (down ? kTileColumns : 0);
    TensorMapFence(first);
    if (!down) TensorMapFence(second);
    const int expert_rows =
        shared.list.row_offsets[tile.expert + 1] - shared.list.row_offsets[tile.expert];
    const uint64_t policy = expert_rows <= kTileRows ? kEvictFirst : kEvictNormal;
    const int blocks = Blocks(down ? args.intermediate : args.hidden);
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      // The answer is needed when this tile is issued; a later question shares tiles more evenly.
      if (block == max(blocks - 3, 0)) ticket = atomicAdd(args.counters + kCounterTicket, 1);
      const int s = cursor.stage;
      BarrierWait(&shared.empty[s], cursor.parity ^ 1);
      uint8_t* const stage = shared.stages[s];
      BarrierArriveExpect(&shared.full[s], kWeightBytes);
      TmaLoad2d(stage, first, &shared.full[s], block * kTileK, tile.column, policy);
      TmaLoad2d(stage + kWeightBytes / 2, second, &shared.full[s], block * kTileK, second_column,
                policy);
      cursor.Advance();
    }
  }
}

// Whether all columns of the tile's requantised rows are in device memory.
__device__ __forceinline__ bool RowsAreThere(const FfnArgs& args, const ExpertTile& tile) {
  int finished;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
               : "=r"(finished)
               : "l"(args.counters + kCounterTiles + tile.row_tile)
               : "memory");
  return finished >= Blocks(args.intermediate);
}
__device__ __forceinline__ void WaitForRows(const FfnArgs& args, const ExpertTile& tile) {
  while (!RowsAreThere(args, tile)) __nanosleep(100);
}

// Rows of a stage beyond the tile's are those of the next expert, or what was there: their products
// are not stored, and no other sees them.

// Warp `part` of kRowWarps: every kRowWarps'th box of a down tile's rows. Arrives for all lanes.
__device__ __forceinline__ void LoadInnerRows(const FfnArgs& args, FfnShared& shared,
                                              StageCursor& cursor, const ExpertTile& tile,
                                              int part) {
  constexpr int kBoxes = kTileRows / kBoxRows / kRowWarps;  // at most
  WaitForRows(args, tile);
  GlobalProxyFence();
  const int boxes = ((tile.rows + kBoxRows - 1) / kBoxRows - part + kRowWarps - 1) / kRowWarps;
  // The same in all lanes, and said so: boxes are then issued from uniform registers.
  const int row = __shfl_sync(0xffffffffu, tile.row + part * kBoxRows, 0);
  const int blocks = Blocks(args.intermediate);
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    const int s = cursor.stage;
    BarrierWait(&shared.empty[s], cursor.parity ^ 1);
    if (ElectLane()) {
      BarrierArriveExpect(&shared.full[s], boxes * (kBoxRows * kTileK));
      uint8_t* const to = shared.stages[s] + kWeightBytes + part * (kBoxRows * kTileK);
#pragma unroll
      for (int i = 0; i < kBoxes; ++i) {
        if (i >= boxes) break;
        TmaLoad2d(to + i * (kRowWarps * kBoxRows * kTileK), &args.inner_rows, &shared.full[s],
                  block * kTileK, row + i * (kRowWarps * kBoxRows), kEvictNormal);
      }
      BarrierArriveMany(&shared.full[s], 31);
    }
    __syncwarp();
    cursor.Advance();
  }
}

// One of kRowWarps warps: gathers the codes of a gate_up tile's rows.
__device__ __forceinline__ void LoadRows(const FfnArgs& args, FfnShared& shared) {
  constexpr int kAtOnce = kRowWarps * 32 / 8;  // rows; 8 threads copy one
  StageCursor cursor;
  TileReader reader;
  for (;;) {
    // Of this tile's entry, which is there until consumers are done with the tile too.
    int32_t& by_engine = shared.by_engine[reader.count() % kTileEntries][RowPart()];
    const ExpertTile tile = reader.Next(shared);
    if (tile.kind == TileKind::kStop) return;
    if (tile.kind == TileKind::kDown) {
      LoadInnerRows(args, shared, cursor, tile, RowPart());
      continue;
    }
    if (tile.slot >= 0) {
      const int row = tile.slot * kTileRows + RowPart() * kHalfRows;
      const int ready = tile.column == 0 ? 0 : Gathered(GatheredWord(args, row));
      if (ready > 0) {
        if (ThreadRead() % 32 == 0) by_engine = 1;
        __syncwarp();
        LoadGatheredRows(args, shared, cursor, row, RowPart(), ready);
      } else {
        GatherHalf(args, shared, cursor, tile, RowPart(), tile.column == 0, row);
      }
      continue;
    }
    const int thread = RowPart() * 32 + ThreadRead() % 32;
    const int chunk = thread % 8, row_of_thread = thread / 8;
    const uint32_t place = kWeightBytes + row_of_thread * kTileK + (chunk ^ row_of_thread % 8) * 16;
    const uint8_t* codes = args.x_codes + chunk * 16;
    const int copies = (tile.rows - row_of_thread + kAtOnce - 1) / kAtOnce;
    uint32_t offset[kTileRows / kAtOnce];  // in 16 bytes
#pragma unroll
    for (int i = 0; i < kTileRows / kAtOnce; ++i) {
      const int row = tile.row + min(row_of_thread + i * kAtOnce, tile.rows - 1);
      offset[i] = static_cast<uint32_t>(SourceRow(args, false, row)) *
                  static_cast<uint32_t>(args.hidden / 16);
    }
#pragma unroll 1
    for (int left = args.hidden - chunk * 16; left > -chunk * 16; left -= kTileK) {
      const int s = cursor.stage;
      BarrierWait(&shared.empty[s], cursor.parity ^ 1);
      const uint32_t to = SharedAddress(shared.stages[s]) + place;
      const int bytes = left > 0 ? 16 : 0;  // 0: zeros, and the address is not used
#pragma unroll
      for (int i = 0; i < kTileRows / kAtOnce; ++i) {
        if (i >= copies) break;
        CopyAsync(to + i * kAtOnce * kTileK, codes + static_cast<uint64_t>(offset[i]) * 16, bytes);
      }
      ArriveAfterCopies(&shared.full[s]);
      codes += kTileK;
      cursor.Advance();
    }
  }
}

// Counts tile `count` of this CTA when its consumers have stored its requantised rows; nothing if
// that was done before or it is no gate_up tile. Of the warp of scales, because the fence takes
// longer than consumers should stand still.
__device__ __forceinline__ void CountStored(const FfnArgs& args, FfnShared& shared,
                                            uint32_t count) {
  if (ThreadRead() % 32 == 0 && shared.uncounted >= 0) {
    BarrierWait(&shared.stored, count % 2);
    __threadfence();  // their stores, which the barrier ordered before this
    atomicAdd(args.counters + kCounterTiles + shared.uncounted, 1);
    shared.uncounted = -1;
  }
  __syncwarp();
}

// One warp: the products of the scales of the tile's rows and of its two weight matrices.
__device__ __forceinline__ void LoadScales(const FfnArgs& args, FfnShared& shared) {
  constexpr int kRows = kTileRows / 32;  // of a lane
  const int lane = ThreadRead() % 32;
  StageCursor cursor;
  TileReader reader;
  for (;;) {
    const ExpertTile& tile = reader.Peek(shared);
    const bool down = tile.kind == TileKind::kDown;
    // What is waited for may be what this warp has not counted yet.
    if (tile.kind == TileKind::kStop ||
        (down && !__all_sync(0xffffffffu, RowsAreThere(args, tile)))) {
      CountStored(args, shared, reader.count() - 1);
      if (!down) return;
      WaitForRows(args, tile);
    }
    const int blocks = Blocks(down ? args.intermediate : args.hidden);
    const bool shares = tile.slot >= 0, keep = shares && tile.column == 0;
    const auto word = [&] { return GatheredWord(args, tile.slot * kTileRows) + 1; };
    const bool gathered = shares && !keep && Gathered(word()) > 0;
    // The lane's first gathered scale.
    const uint32_t kept = static_cast<uint32_t>(tile.slot * blocks * kTileRows + lane);
    const float* const scales = down       ? args.inner_scales
                                : gathered ? args.gathered_scales
                                           : args.x_scales;
    uint32_t offset[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = tile.row + min(lane + 32 * i, tile.rows - 1);
      offset[i] = static_cast<uint32_t>(SourceRow(args, down, row)) * static_cast<uint32_t>(blocks);
    }
    // Lane 0 reads the first matrix', lane 1 the second's. The second of down may lie beyond
    // its end, where any scale does.
    const ExpertEntry& expert = args.experts[tile.expert];
    const int last_column = Blocks(down ? args.hidden : args.intermediate) - 1;
    const int column = min(tile.column / kTileColumns + (down ? lane % 2 : 0), last_column);
    const float* const weights = (down            ? expert.down_scales
                                  : lane % 2 == 0 ? expert.gate_scales
                                                  : expert.up_scales) +
                                 static_cast<int64_t>(column) * blocks;
    const int used = (tile.rows + 31) / 32;
    if (gathered) offset[0] = kept + 3 * lane;  // four at once
    // Under load an answer from L2 takes as long as two blocks last.
    const auto fetch = [&](int block) {
      if (block < blocks) {
        float* const to = shared.raw_scales[block % kScalesAhead];
        if (gathered) {
          CopyAsync(SharedAddress(to + 4 * lane),
                    scales + (offset[0] + static_cast<uint32_t>(block * kTileRows)), 16);
        } else {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if (i < used)
              CopyFloatAsync(to + lane + 32 * i,
                             scales + (offset[i] + static_cast<uint32_t>(block)));
          }
        }
        if (lane < 2) CopyFloatAsync(to + kTileRows + lane, weights + block);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll 1
    for (int block = 0; block < kScalesAhead; ++block) fetch(block);
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kScalesAhead - 1) : "memory");
      __syncwarp();
      const float* const raw = shared.raw_scales[block % kScalesAhead];
      const float first = raw[kTileRows], second = raw[kTileRows + 1];
      float of_row[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        of_row[i] = raw[lane + 32 * i];
        if (keep) {
          args.gathered_scales[kept + static_cast<uint32_t>(block * kTileRows + 32 * i)] =
              of_row[i];
        }
      }
      __syncwarp();  // everybody has read what is overwritten now
      fetch(block + kScalesAhead);
      const int s = cursor.stage;
      BarrierWait(&shared.empty[s], cursor.parity ^ 1);
      float* const to = shared.scales[s] + ScalePlace(lane);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= used) continue;
        to[32 * i] = __fmul_rn(of_row[i], first);
        to[32 * i + kTileRows] = __fmul_rn(of_row[i], second);
      }
      // From block kStages on consumers have left the tile before this one. They are given the last
      // block only afterwards, or they could store another tile before that one is counted. Before
      // a tile of down others may wait for it: at once.
      if (block == (down ? 0 : min(kStages, blocks - 1)))
        CountStored(args, shared, reader.count() - 1);
      BarrierArrive(&shared.full[s]);
      cursor.Advance();
    }
    if (!down && lane == 0) shared.uncounted = tile.row_tile;
    if (keep) {
      __syncwarp();
      if (lane == 0) SetGathered(word(), blocks);
    }
    reader.Done(shared);
  }
}

}  // namespace moebius::kernels::cuda
