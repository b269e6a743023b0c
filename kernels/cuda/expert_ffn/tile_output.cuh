#pragma once

// From accumulators to rows: a tile of 128 columns is rounded to BF16, turned from columns of
// weights to rows of tokens in shared memory, and leaves in 16 lanes a row, 8 elements each.

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bf16.cuh"
#include "kernels/cuda/device/quantizer.cuh"
#include "kernels/cuda/device/row_vector.cuh"
#include "kernels/cuda/device/store_matrix.cuh"
#include "kernels/cuda/expert_ffn/tile_list.cuh"
#include "kernels/cuda/expert_ffn/tile_shape.h"

namespace moebius::kernels::cuda {

inline constexpr int kConsumers = 256;  // two warpgroups, 64 of the 128 columns each
inline constexpr int kTurnRows = 64;    // rows turned at once
inline constexpr int kTurnBytes = kTurnRows * kTileColumns * 2;
// Of all consumers; for the order of their products; of the warps that load rows (bar.sync).
inline constexpr int kConsumerBarrier = 1, kOrderBarrier = 2, kRowBarrier = 3;

// Rows [kFirst, kFirst + kCount) of ForRowsOfTile.
template <int kFirst, int kCount, typename Use>
__device__ __forceinline__ void TurnRows(const float* values, uint8_t* turn, const Use& use) {
  static_assert(kCount <= kTurnRows);
  constexpr int kStride = kTileColumns * 2;
  const int thread = ThreadRead() % kConsumers;
  const int warp = thread / 32, lane = thread % 32;
  // Row of a stored 8x8 matrix and which of the warp's two, for lanes 0 .. 15.
  const int stored_row = lane % 8;
  const int chunk = (2 * warp + lane / 8 % 2) ^ stored_row;
  const uint32_t store_to = SharedAddress(turn) + stored_row * kStride + chunk * 16;
#pragma unroll
  for (int j = 0; j < kCount / 8; ++j) {
    const float* const v = values + 4 * (kFirst / 8 + j);
    StoreMatrices2Transposed(store_to + j * 8 * kStride, RoundToBf16Pair(v[0], v[1]),
                             RoundToBf16Pair(v[2], v[3]));
  }
  NamedBarrier(kConsumerBarrier, kConsumers);
  const int lane_of_row = thread % kBlockLanes;
#pragma unroll
  for (int at = 0; at < kCount; at += kConsumers / kBlockLanes) {
    const int row = at + thread / kBlockLanes;
    RowVector v;
    if (row < kCount) {
      const uint4 bits =
          *reinterpret_cast<const uint4*>(turn + row * kStride + (lane_of_row ^ row % 8) * 16);
      v.pair[0] = bits.x, v.pair[1] = bits.y, v.pair[2] = bits.z, v.pair[3] = bits.w;
    }
    use(kFirst + row, lane_of_row, v);
  }
  NamedBarrier(kConsumerBarrier, kConsumers);
}

// Calls use(row, lane_of_row, elements) for every row of the tile with the 8 neighbouring elements
// that begin at column 8 * lane_of_row: all 32 lanes of a warp together, also for rows from kWidth
// on. `values` are accumulators of m64nNk32 (device/wgmma.cuh), `turn` is kTurnBytes of shared
// memory. Of all consumers; ends with their barrier.
template <int kWidth, typename Use>
__device__ __forceinline__ void ForRowsOfTile(const float (&values)[kWidth / 2], uint8_t* turn,
                                              const Use& use) {
  if constexpr (kWidth <= kTurnRows) {
    TurnRows<0, kWidth>(values, turn, use);
  } else {
    TurnRows<0, kTurnRows>(values, turn, use);
    TurnRows<kTurnRows, kWidth - kTurnRows>(values, turn, use);
  }
}

}  // namespace moebius::kernels::cuda
