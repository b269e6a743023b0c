#pragma once

// From float32 accumulators to rows of BF16.

#include <cstdint>

#include "kernels/cuda/device/store_matrix.cuh"
#include "kernels/cuda/device/wgmma.cuh"

namespace moebius::kernels::cuda {

// Two sums as BF16, nearest even, `low` in the low half. A sum that is NaN becomes the quiet NaN of
// base/float_formats.h: the conversion makes 0x7fff of it, a larger signed number than any other
// result, which the minimum replaces. (Sums of the multiply-adds here are NaN with the sign clear.)
__device__ __forceinline__ uint32_t Bf16Pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  asm("min.s16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x7fc07fc0u));
  return pair;
}

// Sums as a thread of a warp has them from wgmma, of rows r = lane / 4 and r + 8 for tokens 2 (lane
// % 4) and the next, become BF16 of four neighbouring rows for token lane / 4.
__device__ __forceinline__ uint2 TurnSums(const float4& v) {
  const uint32_t low = TransposeMatrix(Bf16Pair(v.x, v.y));
  const uint32_t high = TransposeMatrix(Bf16Pair(v.z, v.w));
  const bool even = threadIdx.x % 2 == 0;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, even ? high : low, 1);
  return even ? make_uint2(low, other) : make_uint2(other, high);
}

// Where a thread stores the four rows that it has after TurnSums.
struct ThreadOutput {
  uint16_t* at;          // for its token of the first group of 8
  int64_t group_stride;  // elements from one group to the next
  int tokens;            // its token of group g exists if 8 g < tokens
  int rows;              // of the four that exist; may be negative
  bool wide;             // all four exist and can be stored at once
};

// For a warp's 16 weight rows from `row0` on and the tile's tokens from `token0` on.
__device__ __forceinline__ ThreadOutput OutputOfThread(uint16_t* out, int64_t stride, int row0,
                                                       int token0, int n, int m, bool aligned) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int row = row0 + (quad % 2 == 0 ? 2 * quad : 8 + 2 * (quad - 1));
  return {Kept(out + (token0 + lane / 4) * stride + row), 8 * stride, m - token0 - lane / 4,
          n - row, aligned && row0 + 16 <= n};
}

// Stores up to kMost groups of 8 tokens from `first` on, `count` of which are asked for; sums(i)
// are those of group first + i. All lanes of a warp take part.
template <int kMost, typename Sums>
__device__ __forceinline__ void StoreGroups(const ThreadOutput& out, int first, int count,
                                            const Sums& sums) {
  uint16_t* to = out.at + first * out.group_stride;
  const int tokens = min(out.tokens - 8 * first, 8 * count);
#pragma unroll
  for (int i = 0; i < kMost; ++i, to += out.group_stride) {
    const uint2 four = TurnSums(sums(i));
    if (8 * i >= tokens) continue;
    if (out.wide) {
      *reinterpret_cast<uint2*>(to) = four;
    } else {
      const uint64_t rows = four.x | static_cast<uint64_t>(four.y) << 32;
#pragma unroll 1
      for (int r = 0; r < min(out.rows, 4); ++r) to[r] = static_cast<uint16_t>(rows >> (16 * r));
    }
  }
}

// The same sums as BF16 to shared memory, a row for each of the 8 tokens, `pitch` bytes apart: the
// warp's 16 weight rows from `to` on. All lanes take part.
__device__ __forceinline__ void StoreSumsTransposed(uint8_t* to, int pitch, const float4& v) {
  const int lane = threadIdx.x % 32;
  StoreMatrices2Transposed(SharedAddress(to + lane % 8 * pitch + lane / 8 % 2 * 16),
                           Bf16Pair(v.x, v.y), Bf16Pair(v.z, v.w));
}

// Copies `rows` rows of up to kColumns elements, of which `columns` exist, from shared memory.
template <int kColumns, int kThreads>
__device__ __forceinline__ void StoreRows(uint16_t* out, int64_t stride, const uint8_t* from,
                                          int pitch, int rows, int columns, bool aligned) {
  if (aligned && columns == kColumns) {
    constexpr int kChunks = kColumns / 8;
#pragma unroll 2
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<uint4*>(out + row * stride + 8 * chunk) =
          *reinterpret_cast<const uint4*>(from + row * pitch + 16 * chunk);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
      const int row = i / columns, column = i % columns;
      out[row * stride + column] =
          *reinterpret_cast<const uint16_t*>(from + row * pitch + 2 * column);
    }
  }
}

}  // namespace moebius::kernels::cuda
