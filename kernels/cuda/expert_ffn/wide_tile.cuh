#pragma once

// Tiles of more than kNarrowRows rows, rows as operand A: warpgroup g multiplies rows 64 g .. 64 g
// + 63 by both matrices, 128 columns each. A thread then has the scales of two rows instead of one
// for each column, and a warp all columns of its 16 rows, so that nothing but the warp takes part
// in their output. The bits are those of tile_product.cuh (docs/adr/0011).

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/quantizer.cuh"
#include "kernels/cuda/device/row_vector.cuh"
#include "kernels/cuda/device/store_matrix.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/expert_ffn/cta_state.cuh"
#include "kernels/cuda/expert_ffn/tile_swiglu.cuh"

namespace moebius::kernels::cuda {

inline constexpr int kWarpRows = 16;
inline constexpr int kWideSums = kTileColumns / 2;  // of a thread and matrix
inline constexpr int kWarpTurnBytes = kTurnBytes / (kConsumers / 32);

// sum = fma(scale, part, sum), the thread's two rows `upper` and 8 below.
__device__ __forceinline__ void AddScaledRows(float (&sum)[kWideSums],
                                              const float (&part)[kWideSums], float upper,
                                              float lower) {
#pragma unroll
  for (int i = 0; i < kWideSums; ++i)
    sum[i] = __fmaf_rn(i / 2 % 2 == 0 ? upper : lower, part[i], sum[i]);
}

// Both products of a tile for the 64 rows of warpgroup `group`. While one warpgroup adds, the other
// multiplies; what the next block needs is made ready while the second product runs. `by_engine`:
// whether the copy engine loads the rows of `group`, known when the first of them are there; where
// it does not, they come by ordinary asynchronous copies.
__device__ __forceinline__ void MultiplyWideTile(FfnShared& shared, StageCursor& cursor, int group,
                                                 int blocks, const int32_t* by_engine,
                                                 float (&first)[kWideSums],
                                                 float (&second)[kWideSums]) {
  constexpr uint32_t kStep = kStageBytes / 16;
  const uint32_t stages = SharedAddress(shared.stages[0]);
  // Of the stage in hand. Carried from block to block: made from its number, they would be a chain
  // of dependent instructions between one product and the next.
  uint32_t weights =
      static_cast<uint32_t>(KMajorDescriptor(stages)) + static_cast<uint32_t>(cursor.stage) * kStep;
  uint32_t rows =
      static_cast<uint32_t>(KMajorDescriptor(stages + kWeightBytes + group * 64 * kTileK)) +
      static_cast<uint32_t>(cursor.stage) * kStep;
  const int thread = ThreadRead() % 128;
  const int place = ScalePlace(group * 64 + thread / 32 * kWarpRows + thread % 32 / 4);
#pragma unroll
  for (int i = 0; i < kWideSums; ++i) first[i] = second[i] = 0.0f;

  float part[kWideSums];
  const auto multiply = [&](uint32_t matrix) {
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kTileK / 32; ++step) {
      WgmmaInstruction<E4m3Operands, kTileColumns>::Shared(
          part, kDescriptorHigh | (rows + 2 * step),
          kDescriptorHigh | (weights + matrix + 2 * step), step != 0);
    }
    WgmmaCommit();
  };
  bool copied;
  float upper, lower;  // the thread's scales in the block's first product
  const auto take_stage = [&](int s) {
    upper = shared.scales[s][place];
    lower = shared.scales[s][place + 2];
    if (copied) ProxyFence();
  };

  const bool leads = ThreadRead() % 32 == 0;
  const auto release = [&](int s) {
    __syncwarp();
    if (leads) BarrierArrive(&shared.empty[s]);
  };

  BarrierWait(&shared.full[cursor.stage], cursor.parity);
  copied = by_engine != nullptr && *by_engine == 0;
  take_stage(cursor.stage);
  // Warpgroup 0 begins: if its first product met the other's second, both would add at the same
  // time, in every block. Tiles of few blocks do without, or one could arrive twice.
  const bool in_turn = blocks > 2 * kStages;
  if (in_turn && group == 1) NamedBarrier(kOrderBarrier, kConsumers);
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    const int s = cursor.stage;
    multiply(0);
    if (in_turn && group == 0 && block == 0) NamedBarrierArrive(kOrderBarrier, kConsumers);
    WgmmaWait<0>();
    KeepRegisters(part);
    AddScaledRows(first, part, upper, lower);
    multiply(kWeightBytes / 2 / 16);
    const float second_upper = shared.scales[s][kTileRows + place];
    const float second_lower = shared.scales[s][kTileRows + place + 2];
    cursor.Advance();
    const uint32_t step = cursor.stage == 0 ? 0u - (kStages - 1) * kStep : kStep;
    weights += step;
    rows += step;
    const bool more = block + 1 < blocks;
    // Lanes ask one after another, if at all, and must agree.
    const bool ready = __all_sync(
        0xffffffffu, more && BarrierHasPassed(&shared.full[cursor.stage], cursor.parity));
    if (ready) take_stage(cursor.stage);
    WgmmaWait<0>();
    KeepRegisters(part);
    const bool late = leads && (ready || !more);
    if (more && !ready) {
      release(s);  // loads are behind: at once
      BarrierWait(&shared.full[cursor.stage], cursor.parity);
      take_stage(cursor.stage);
    }
    AddScaledRows(second, part, second_upper, second_lower);
    __syncwarp();
    if (late) BarrierArrive(&shared.empty[s]);
  }
}

// Rows beyond the tile's are products of what lay in shared memory. NaN and zeros there would send
// the whole warp the long ways of SwiGLU, the quantiser and rounding, 20,000 clocks a tile: their
// sums become a gate of 1 and an up of 0. (A warp without rows must not leave the tile early: the
// compiler would then keep descriptors in vector registers, 7 % more clocks for all tiles.)
__device__ __forceinline__ void SetRowsBeyond(int rows, float (&first)[kWideSums],
                                              float (&second)[kWideSums]) {
  const int row = ThreadRead() / 32 * kWarpRows + ThreadRead() % 32 / 4;
#pragma unroll
  for (int i = 0; i < kWideSums; ++i) {
    const bool beyond = row + i / 2 % 2 * 8 >= rows;
    first[i] = beyond ? 1.0f : first[i];
    second[i] = beyond ? 0.0f : second[i];
  }
}

// The eight sums of a row of a thread, `lower` or upper, that begin at `i`: columns 8 (i / 4) + 2
// (lane % 4) and the next, and so on every 8 columns; rounded.
__device__ __forceinline__ RowVector RoundedSums(const float (&sums)[kWideSums], int i, int lower) {
  return RoundedVector([&](int k) { return sums[i + k / 2 * 4 + 2 * lower + k % 2]; });
}

// Stores the warp's rows of 128 columns of down, the first `column`. `turn` is kWarpTurnBytes of
// the warp's own.
__device__ __forceinline__ void StoreWarpRows(const FfnArgs& args, const ExpertTile& tile,
                                              int column, const float (&sums)[kWideSums],
                                              uint8_t* turn) {
  constexpr int kStride = kTileColumns * 2;
  const int thread = ThreadRead() % kConsumers, lane = thread % 32;
  const int lane_of_row = lane % kBlockLanes;
  column += lane_of_row * kVectorElements;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const uint32_t to = SharedAddress(turn) + lane % 8 * kStride;
#pragma unroll
    for (int i = 0; i < kWideSums; i += 16) {
      const RowVector v = RoundedSums(sums, i, lower);
      StoreMatrices4(to + ((i / 4 + lane / 8) ^ lane % 8) * 16, v.pair[0], v.pair[1], v.pair[2],
                     v.pair[3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i += 32 / kBlockLanes) {
      const int of_eight = i + lane / kBlockLanes;
      const int row = thread / 32 * kWarpRows + 8 * lower + of_eight;
      if (row >= tile.rows || column >= args.hidden) continue;
      *reinterpret_cast<uint4*>(args.out + ElementOffset(tile.row + row, args.hidden, column)) =
          *reinterpret_cast<const uint4*>(turn + of_eight * kStride +
                                          (lane_of_row ^ of_eight) * 16);
    }
    __syncwarp();
  }
}

// Quantises the warp's rows and stores codes and scales. One branch for all that a thread has: the
// steps of its two rows then overlap.
__device__ __forceinline__ void RequantiseWarpRows(const FfnArgs& args, const ExpertTile& tile,
                                                   const float (&sums)[kWideSums], uint8_t* turn) {
  const int thread = ThreadRead() % kConsumers, lane = thread % 32;
  const int first_row = thread / 32 * kWarpRows;
  RowVector v[2][4];
  uint32_t largest[2] = {0, 0};
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int at = 16 * i + 4 * p + 2 * lower;
        v[lower][i].pair[p] = RoundNumbersToBf16Pair(sums[at], sums[at + 1]);
        largest[lower] = __vmaxu2(largest[lower], v[lower][i].pair[p] & 0x7fff7fffu);
      }
    }
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2)
      largest[lower] =
          __vmaxu2(largest[lower], __shfl_xor_sync(0xffffffffu, largest[lower], offset));
    largest[lower] = max(largest[lower] & 0xffffu, largest[lower] >> 16);
  }
  BlockScale scale[2];
  uint2 codes[2][4];
  if (max(largest[0], largest[1]) < kNotFinite) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      scale[lower] = ScaleOfFinite(largest[lower], args.power_of_two_scales);
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[lower][i] = CodesOfFinite(v[lower][i], scale[lower]);
    }
  } else {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      scale[lower] = ScaleOfBlock(largest[lower], args.power_of_two_scales);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        codes[lower][i] = CodesOfVector(RoundedSums(sums, 16 * i, lower), scale[lower]);
    }
  }
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    // Stored as 16-bit elements, two codes each: 16 bytes then hold columns 0 1 8 9 2 3 10 11 4 ..
    const uint32_t to = SharedAddress(turn) + (8 * lower + lane % 8) * kTileColumns;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      StoreMatrices4(to + ((2 * i + lane / 8) ^ lane % 8) * 16, codes[lower][i].x,
                     codes[lower][i].y, codes[lower][i + 1].x, codes[lower][i + 1].y);
    }
    const int row = first_row + 8 * lower + lane / 4;
    if (lane % 4 == 0 && row < tile.rows) {
      args.inner_scales[ElementOffset(tile.row + row, Blocks(args.intermediate),
                                      tile.column / kTileColumns)] = scale[lower].scale;
    }
  }
  __syncwarp();
  const int chunk = lane % 8, column = tile.column + chunk * 16;
#pragma unroll
  for (int i = 0; i < kWarpRows; i += 4) {
    const int of_warp = i + lane / 8, row = first_row + of_warp;
    const uint4 c =
        *reinterpret_cast<const uint4*>(turn + of_warp * kTileColumns + (chunk ^ of_warp % 8) * 16);
    const uint4 codes = {__byte_perm(c.x, c.y, 0x5410), __byte_perm(c.z, c.w, 0x5410),
                         __byte_perm(c.x, c.y, 0x7632), __byte_perm(c.z, c.w, 0x7632)};
    if (row >= tile.rows || column >= args.intermediate) continue;
    *reinterpret_cast<uint4*>(args.inner_codes +
                              ElementOffset(tile.row + row, args.intermediate, column)) = codes;
  }
  __syncwarp();
}

__device__ __forceinline__ void ComputeWideTile(const FfnArgs& args, FfnShared& shared,
                                                StageCursor& cursor, const ExpertTile& tile,
                                                const int32_t* by_engine) {
  const bool down = tile.kind == TileKind::kDown;
  float first[kWideSums], second[kWideSums];
  // The same in all lanes, and said so: the descriptors then live in uniform registers.
  const int group = __shfl_sync(0xffffffffu, ThreadRead() / 128, 0);
  MultiplyWideTile(shared, cursor, group, Blocks(down ? args.intermediate : args.hidden),
                   down ? nullptr : by_engine + group, first, second);
  if (tile.rows < (ThreadRead() / 32 + 1) * kWarpRows) SetRowsBeyond(tile.rows, first, second);
  uint8_t* const turn = shared.turn + ThreadRead() / 32 * kWarpTurnBytes;
  if (down) {
    StoreWarpRows(args, tile, tile.column, first, turn);
    StoreWarpRows(args, tile, tile.column + kTileColumns, second, turn);
    return;
  }
  SwiGluInPlace(first, second);
  RequantiseWarpRows(args, tile, first, turn);
  if (ThreadRead() % 32 == 0) BarrierArrive(&shared.stored);  // RequantiseWarpRows ends together
}

}  // namespace moebius::kernels::cuda
