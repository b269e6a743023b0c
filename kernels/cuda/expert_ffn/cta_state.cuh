#pragma once

// What the roles of a CTA of the grouped FFN share: the launch's arguments, shared memory, and how
// they walk through tiles and stages. The weight loader announces tiles; every role then does the
// same sequence of K blocks, a stage each.

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/expert_ffn/expert_table.h"
#include "kernels/cuda/expert_ffn/tile_list.cuh"
#include "kernels/cuda/expert_ffn/tile_output.cuh"
#include "kernels/cuda/expert_ffn/tile_shape.h"

namespace moebius::kernels::cuda {

struct FfnArgs {
  CUtensorMap inner_rows;     // of inner_codes, boxes of kBoxRows rows and kTileK codes
  CUtensorMap gathered_rows;  // of the workspace's gathered codes, boxes of kHalfRows rows
  const ExpertEntry* experts;
  int num_experts;
  const int32_t* row_offsets;
  int rows_max;
  int hidden, intermediate;
  const uint8_t* x_codes;
  const float* x_scales;
  const int32_t* row_index;
  uint8_t* inner_codes;
  float* inner_scales;
  float* gathered_scales;
  int32_t* gathered;
  int32_t* counters;
  uint16_t* out;
  bool power_of_two_scales;
  bool with_down;
};

inline constexpr int kRowWarps = 2;
inline constexpr int kWeightBytes = 2 * kTileColumns * kTileK;
inline constexpr int kBoxRows = 16;
inline constexpr int kHalfRows = kTileRows / kRowWarps;  // of a warp, where rows are shared
inline constexpr int kRowBytes = kTileRows * kTileK;
inline constexpr int kStageBytes = kWeightBytes + kRowBytes;
inline constexpr int kStageScales =
    2 * kTileRows;  // scale of row * scale of weights, for either matrix
inline constexpr int kStages = (202 * 1024) / kStageBytes;
inline constexpr int kScalesAhead =
    8;  // blocks whose scales are on their way before they are multiplied
inline constexpr int kTileEntries = 4;  // tiles announced and not yet taken up by everybody
inline constexpr int kThreads = kConsumers + 128;
// Of a thread; the CTA starts with 168 each and can only share out those.
inline constexpr int kConsumerRegisters = 232, kLoaderRegisters = 40;
static_assert(kConsumers * kConsumerRegisters + 128 * kLoaderRegisters <= kThreads * 168,
              "more would wait for ever");

// Who waits for an announced tile: the warps of the consumers, of rows and of scales.
inline constexpr int kTileReaders = kConsumers / 32 + kRowWarps + 1;

struct FfnShared {
  alignas(1024) uint8_t stages[kStages][kStageBytes];  // weights, then rows; 128-byte swizzled
  alignas(16) uint8_t turn[kTurnBytes];
  alignas(16) float scales[kStages][kStageScales];
  alignas(16) float raw_scales[kScalesAhead][kTileRows + 4];  // of rows; of the two weight blocks
  uint64_t full[kStages], empty[kStages];
  uint64_t announced[kTileEntries], taken[kTileEntries];
  uint64_t stored;  // by each warp of consumers, when its part of a gate_up tile is in memory
  ExpertTile tiles[kTileEntries];
  // Whether the copy engine loads the rows of each tile that each warp of rows has.
  int32_t by_engine[kTileEntries][kRowWarps];
  TileList list;
  int32_t uncounted;  // the tile of rows of what `stored` is for, or -1
  int32_t last;
};
static_assert(sizeof(FfnShared) <= 227 * 1024, "a CTA has 227 KB of shared memory");

__device__ __forceinline__ int Blocks(int size) { return (size + kTileK - 1) / kTileK; }

// Of unsigned factors: one instruction.
__device__ __forceinline__ uint64_t ElementOffset(int row, int width, int column) {
  return static_cast<uint64_t>(static_cast<uint32_t>(row)) * static_cast<uint32_t>(width) +
         static_cast<uint32_t>(column);
}

// Low halves of KMajorDescriptor differ; 32 bytes of K further is 2 more.
inline constexpr uint64_t kDescriptorHigh = 0x40000040ull << 32;

// Where the scale of a row lies among a stage's: a thread that holds columns 8 j + 2 q and the next
// of the product (device/wgmma.cuh) finds those of j and j + 1 side by side.
__device__ __forceinline__ int ScalePlace(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}

// Position in the ring of stages. Every role walks the same sequence of K blocks.
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

class TileReader {
 public:
  __device__ __forceinline__ ExpertTile Next(FfnShared& shared) {
    const ExpertTile tile = Peek(shared);
    Done(shared);
    return tile;
  }
  // The next tile where it was announced, there until this warp is Done with it.
  __device__ __forceinline__ const ExpertTile& Peek(FfnShared& shared) const {
    const int entry = static_cast<int>(count_ % kTileEntries);
    BarrierWait(&shared.announced[entry], (count_ / kTileEntries) % 2);
    return shared.tiles[entry];
  }
  __device__ __forceinline__ void Done(FfnShared& shared) {
    __syncwarp();
    if (ThreadRead() % 32 == 0) BarrierArrive(&shared.taken[count_ % kTileEntries]);
    ++count_;
  }
  __device__ __forceinline__ uint32_t count() const { return count_; }  // tiles it is done with

 private:
  uint32_t count_ = 0;
};

}  // namespace moebius::kernels::cuda
