#pragma once

// The multiplying role of a CTA. Tiles of few rows here: weights are operand A, and two warpgroups
// have 64 of the tile's 128 columns each, of both matrices. Tiles of more rows: wide_tile.cuh.

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/expert_ffn/cta_state.cuh"
#include "kernels/cuda/expert_ffn/tile_output.cuh"
#include "kernels/cuda/expert_ffn/tile_swiglu.cuh"
#include "kernels/cuda/expert_ffn/wide_tile.cuh"

namespace moebius::kernels::cuda {

template <int kWidth>
__device__ __forceinline__ void IssueBlock(float (&part)[kWidth / 2], uint32_t weights,
                                           uint32_t rows) {
#pragma unroll
  for (int step = 0; step < kTileK / 32; ++step) {
    WgmmaInstruction<E4m3Operands, kWidth>::Shared(part, kDescriptorHigh | (weights + 2 * step),
                                                   kDescriptorHigh | (rows + 2 * step), step != 0);
  }
  WgmmaCommit();
}

// sum = fma(scale, part, sum); scales as ScalePlace puts them.
template <int kWidth>
__device__ __forceinline__ void AddScaled(float (&sum)[kWidth / 2], const float (&part)[kWidth / 2],
                                          const float* scales) {
  const float* const mine = scales + ThreadRead() % 4 * 4;
#pragma unroll
  for (int j = 0; j < kWidth / 8; j += 2) {
    float scale[4];
    *reinterpret_cast<float4*>(scale) = *reinterpret_cast<const float4*>(mine + 8 * j);
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 8 && i < kWidth / 2; ++i)
      sum[i] = __fmaf_rn(scale[(i - 4 * j) / 4 * 2 + i % 2], part[i], sum[i]);
  }
}

// Both products of a tile for this warpgroup's 64 columns of either matrix. `weights` and `rows`:
// descriptors in the first stage. `copied`: rows came by ordinary asynchronous copies.
template <int kWidth>
__device__ __forceinline__ void MultiplyTile(FfnShared& shared, StageCursor& cursor,
                                             uint32_t weights, uint32_t rows, int blocks,
                                             bool copied, float (&first)[kWidth / 2],
                                             float (&second)[kWidth / 2]) {
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) first[i] = second[i] = 0.0f;
  for (int block = 0; block < blocks; ++block) {
    const int s = cursor.stage;
    const uint32_t stage = static_cast<uint32_t>(s) * (kStageBytes / 16);
    constexpr uint32_t kSecond = kWeightBytes / 2 / 16;
    const float* const scales = shared.scales[s];
    BarrierWait(&shared.full[s], cursor.parity);
    if (copied) ProxyFence();
    float part[kWidth / 2];
    WgmmaFence();
    IssueBlock<kWidth>(part, weights + stage, rows + stage);
    if constexpr (kWidth <= 64) {
      float other[kWidth / 2];
      IssueBlock<kWidth>(other, weights + stage + kSecond, rows + stage);
      WgmmaWait<1>();
      KeepRegisters(part);
      AddScaled<kWidth>(first, part, scales);
      WgmmaWait<0>();
      KeepRegisters(other);
      AddScaled<kWidth>(second, other, scales + kTileRows);
    } else {
      // No registers for a second set: the other warpgroup multiplies meanwhile.
      WgmmaWait<0>();
      KeepRegisters(part);
      AddScaled<kWidth>(first, part, scales);
      WgmmaFence();
      IssueBlock<kWidth>(part, weights + stage + kSecond, rows + stage);
      WgmmaWait<0>();
      KeepRegisters(part);
      AddScaled<kWidth>(second, part, scales + kTileRows);
    }
    __syncwarp();
    if (ThreadRead() % 32 == 0) BarrierArrive(&shared.empty[s]);
    cursor.Advance();
  }
}

// SetRowsBeyond of wide_tile.cuh, where rows of the tile are columns of the products.
template <int kWidth>
__device__ __forceinline__ void SetColumnsBeyond(int rows, float (&first)[kWidth / 2],
                                                 float (&second)[kWidth / 2]) {
  const int column = ThreadRead() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    const bool beyond = column + i / 4 * 8 + i % 2 >= rows;
    first[i] = beyond ? 1.0f : first[i];
    second[i] = beyond ? 0.0f : second[i];
  }
}

template <int kWidth>
__device__ __forceinline__ void ComputeTile(const FfnArgs& args, FfnShared& shared,
                                            StageCursor& cursor, const ExpertTile& tile) {
  const bool down = tile.kind == TileKind::kDown;
  float first[kWidth / 2], second[kWidth / 2];
  // The same in all lanes, and said so: the descriptors then live in uniform registers.
  const int group = __shfl_sync(0xffffffffu, ThreadRead() / 128, 0);
  const uint32_t stage = SharedAddress(shared.stages[0]);
  MultiplyTile<kWidth>(shared, cursor,
                       static_cast<uint32_t>(KMajorDescriptor(stage + group * 64 * kTileK)),
                       static_cast<uint32_t>(KMajorDescriptor(stage + kWeightBytes)),
                       Blocks(down ? args.intermediate : args.hidden), !down, first, second);
  if (tile.rows < kWidth) SetColumnsBeyond<kWidth>(tile.rows, first, second);
  if (down) {
    const auto store = [&](int first_column) {
      return [&, first_column](int row, int lane_of_row, const RowVector& v) {
        const int column = first_column + lane_of_row * kVectorElements;
        if (row >= tile.rows || column >= args.hidden) return;
        StoreVector<true>(v, args.out + ElementOffset(tile.row + row, args.hidden, column), 0, 8);
      };
    };
    ForRowsOfTile<kWidth>(first, shared.turn, store(tile.column));
    ForRowsOfTile<kWidth>(second, shared.turn, store(tile.column + kTileColumns));
    return;
  }
  SwiGluInPlace(first, second);
  ForRowsOfTile<kWidth>(first, shared.turn, [&](int row, int lane_of_row, const RowVector& v) {
    const BlockScale scale = ScaleOfBlock(LargestOfBlock(v), args.power_of_two_scales);
    if (row >= tile.rows) return;
    const int column = tile.column + lane_of_row * kVectorElements;
    if (column >= args.intermediate) return;
    StoreCodes<true>(CodesOfVector(v, scale),
                     args.inner_codes + ElementOffset(tile.row + row, args.intermediate, column), 0,
                     8);
    if (lane_of_row == 0) {
      args.inner_scales[ElementOffset(tile.row + row, Blocks(args.intermediate),
                                      tile.column / kTileColumns)] = scale.scale;
    }
  });
  if (ThreadRead() % 32 == 0) BarrierArrive(&shared.stored);  // ForRowsOfTile ends together
}

__device__ __forceinline__ void Compute(const FfnArgs& args, FfnShared& shared) {
  StageCursor cursor;
  TileReader reader;
  bool after_wide = false;
  for (;;) {
    const ExpertTile& tile = reader.Peek(shared);
    if (tile.kind == TileKind::kStop) return;
    const bool wide = tile.rows > kNarrowRows;
    // The output of a wide tile ends warp by warp, that of a narrow one begins with memory of all.
    if (after_wide && !wide) NamedBarrier(kConsumerBarrier, kConsumers);
    after_wide = wide;
    if (tile.rows <= 8) {
      ComputeTile<8>(args, shared, cursor, tile);
    } else if (tile.rows <= 16) {
      ComputeTile<16>(args, shared, cursor, tile);
    } else if (tile.rows <= 32) {
      ComputeTile<32>(args, shared, cursor, tile);
    } else if (tile.rows <= 48) {
      ComputeTile<48>(args, shared, cursor, tile);
    } else if (tile.rows <= 64) {
      ComputeTile<64>(args, shared, cursor, tile);
    } else if (!wide) {
      ComputeTile<kNarrowRows>(args, shared, cursor, tile);
    } else {
      ComputeWideTile(args, shared, cursor, tile, shared.by_engine[reader.count() % kTileEntries]);
    }
    reader.Done(shared);
  }
}

}  // namespace moebius::kernels::cuda
