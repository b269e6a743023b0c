#pragma once

// The work of one launch as a list of tiles in a fixed order: gate_up tiles of all experts, then
// down tiles of all experts; within an expert kBandTiles tiles of rows at a time, for them column
// tiles ascending, and for each column the tiles of rows, so that neighbours in the list share
// weights. CTAs draw tickets, positions in the list.
//
// Where many rows are gathered, the tile of the first column does it for the other columns of its
// rows (shared_rows.cuh). It comes early: the list begins with kLeadTiles tiles of first columns,
// and from there on one comes before as many of other columns as a tile of rows has.
//
// Why that cannot hang: a gate_up tile waits only for one that has begun to gather its rows, a down
// tile for gate_up tiles, and those were drawn before it by CTAs that are running.

#include <cstdint>

#include "kernels/cuda/expert_ffn/tile_shape.h"

namespace moebius::kernels::cuda {

// threadIdx.x, read again at every call: what is computed from it then lives only where it is used.
// Kept over a whole tile it would cost the accumulators their registers.
__device__ __forceinline__ int ThreadRead() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 1023;  // what tells the compiler that it is not negative
}

enum class TileKind : int32_t { kGateUp, kDown, kStop };

struct ExpertTile {
  TileKind kind;
  int32_t expert;
  int32_t column;    // first column of the first 128; those of up, or the next 128 of down, follow
  int32_t row;       // first packed row
  int32_t rows;      // 1 .. kTileRows
  int32_t row_tile;  // among all tiles of rows of the launch
  int32_t slot;      // gate_up: of its rows among those that are gathered for all columns, or -1
};

// In shared memory, the same in every CTA.
struct TileList {
  int32_t row_offsets[kMostExperts + 1];
  int32_t row_tiles[kMostExperts + 1];  // tiles of rows before each expert
  int32_t slots[kMostExperts + 1];      // tiles before each expert whose rows are shared
  int32_t lead;  // tiles of the first column that come first; 0: none, and no rows are shared

  static constexpr int kBandTiles = 16, kLeadTiles = 64;

  // All threads of the CTA; the first warp scans. Offsets beyond rows_max are cut off.
  __device__ __forceinline__ void Build(const int32_t* offsets, int experts, int rows_max,
                                        int gate_up_columns) {
#pragma unroll 1
    for (int e = ThreadRead(); e <= experts; e += static_cast<int>(blockDim.x))
      row_offsets[e] = min(max(offsets[e], 0), rows_max);
    __syncthreads();
    if (const int lane = ThreadRead(); lane < 32) {
      int before = 0, slots_before = 0;
#pragma unroll 1
      for (int base = 0; base < experts; base += 32) {
        const int e = base + lane;
        const int rows = e < experts ? max(row_offsets[e + 1] - row_offsets[e], 0) : 0;
        const int own = (rows + kTileRows - 1) / kTileRows;
        const int own_slots = (rows + kTileRows - kNarrowRows - 1) / kTileRows;
        int sum = own, slot = own_slots;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, sum, offset);
          const int other_slots = __shfl_up_sync(0xffffffffu, slot, offset);
          if (lane >= offset) sum += other, slot += other_slots;
        }
        if (e < experts) {
          row_tiles[e] = before + sum - own;
          slots[e] = slots_before + slot - own_slots;
        }
        before += __shfl_sync(0xffffffffu, sum, 31);
        slots_before += __shfl_sync(0xffffffffu, slot, 31);
      }
      if (lane == 0) {
        row_tiles[experts] = before;
        slots[experts] = slots_before;
        // With less, most tiles would be drawn before the first have gathered anything.
        const bool shares = slots_before * gate_up_columns >= 3 * static_cast<int>(gridDim.x);
        lead = shares ? min(kLeadTiles, before) : 0;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ ExpertTile Find(int ticket, int experts, int gate_up_columns,
                                             int down_columns) const {
    const int all_row_tiles = row_tiles[experts];
    ExpertTile tile = {TileKind::kStop, 0, 0, 0, 0, 0, -1};
    int columns = gate_up_columns, column = 0;
    tile.kind = TileKind::kGateUp;
    if (ticket >= all_row_tiles * columns) {
      ticket -= all_row_tiles * columns;
      columns = down_columns;
      tile.kind = TileKind::kDown;
      if (ticket >= all_row_tiles * columns) {
        tile.kind = TileKind::kStop;
        return tile;
      }
    }
    if (lead > 0 && tile.kind == TileKind::kGateUp) {
      // Behind the lead, groups of `columns` tiles: one of the first column while there are any,
      // the others of other columns.
      const int behind = ticket - lead, group = behind / columns, later = all_row_tiles - lead;
      if (behind >= 0 && (behind % columns != 0 || group >= later)) {
        ticket = behind - min(group + 1, later);
        --columns;
        column = 1;
      } else {
        if (behind >= 0) ticket = lead + group;
        columns = 1;
      }
    }
    // The last expert whose tiles begin at or before the ticket: empty ones before it share the
    // beginning of their successor.
    int low = 0, high = experts;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (row_tiles[middle] * columns <= ticket) {
        low = middle;
      } else {
        high = middle;
      }
    }
    int width = row_tiles[low + 1] - row_tiles[low];
    int within = ticket - row_tiles[low] * columns, row_tile = 0;
    if (width > kBandTiles) {
      row_tile = within / (kBandTiles * columns) * kBandTiles;
      within -= row_tile * columns;
      width = min(kBandTiles, width - row_tile);
    }
    row_tile += within % width;
    tile.expert = low;
    column += within / width;
    tile.column = column * (tile.kind == TileKind::kDown ? 2 : 1) * kTileColumns;
    tile.row = row_offsets[low] + row_tile * kTileRows;
    tile.rows = min(kTileRows, row_offsets[low + 1] - tile.row);
    tile.row_tile = row_tiles[low] + row_tile;
    const bool shares = lead > 0 && tile.kind == TileKind::kGateUp && tile.rows > kNarrowRows;
    if (shares) tile.slot = slots[low] + row_tile;
    return tile;
  }
};

}  // namespace moebius::kernels::cuda
