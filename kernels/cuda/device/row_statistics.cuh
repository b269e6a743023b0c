#pragma once

// The sum of squares of a row, in an order that depends on the row's length alone.
//
// A row of `dim` elements is cut into vectors of 8. T = StatisticsThreads(dim) threads share it:
// thread t adds the squares of vectors t and t + T by fma, ascending, from zero. Within a
// warp lanes are folded l with l + 16, + 8, + 4, + 2, + 1; then warps, in fours ((0 + 1) + (2 +
// 3)), the fours ascending. A block may have more threads than T: theirs are zeros, which change no
// bit.

#include <cstdint>

#include "kernels/cuda/device/row_vector.cuh"

namespace moebius::kernels::cuda {

// Two vectors a thread: a row of 7,168 is 448 threads with both loads in flight.
inline constexpr int kStatisticsVectors = 2;
inline constexpr int64_t kStatisticsMaxDim = 1024 * kStatisticsVectors * kVectorElements;

constexpr int StatisticsThreads(int64_t dim) {
  constexpr int64_t kWarpElements = 32 * kStatisticsVectors * kVectorElements;
  return static_cast<int>((dim + kWarpElements - 1) / kWarpElements * 32);
}

// Weights [at, at + 8) of `dim`; 0 past the end. kAligned: dim is a multiple of 8, weight
// 16-aligned.
template <bool kAligned>
__device__ __forceinline__ void LoadWeights(const float* weight, int at, int dim,
                                            float (&out)[kVectorElements]) {
#pragma unroll
  for (int i = 0; i < kVectorElements; ++i) out[i] = 0.0f;
  if constexpr (kAligned) {
    if (at >= dim) return;
#pragma unroll
    for (int i = 0; i < kVectorElements; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(weight + at + i);
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
      if (at + i < dim) out[i] = weight[at + i];
    }
  }
}

// Adds the squares of one vector to a thread's chain.
__device__ __forceinline__ float AddSquares(const RowVector& v, float sum) {
#pragma unroll
  for (int i = 0; i < kVectorElements; ++i) sum = __fmaf_rn(v.At(i), v.At(i), sum);
  return sum;
}

// Folds the threads' chains; every thread of the block calls it and gets the sum. `parts` is shared
// memory, 32 floats, 16-aligned, that nobody touches until the next barrier of the block.
__device__ __forceinline__ float FoldBlock(float sum, float* parts) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, offset));
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  if (static_cast<int>(threadIdx.x) >= warps && threadIdx.x < 32) parts[threadIdx.x] = 0.0f;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (4 * i < warps) {
      const float4 four = reinterpret_cast<const float4*>(parts)[i];
      total = __fadd_rn(total, __fadd_rn(__fadd_rn(four.x, four.y), __fadd_rn(four.z, four.w)));
    }
  }
  return total;
}

// rsqrt(mean + eps) as kernels/reference computes it: division and root each rounded once.
__device__ __forceinline__ float InverseRms(float sum_of_squares, int dim, float eps) {
  const float mean = __fdiv_rn(sum_of_squares, static_cast<float>(dim));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

}  // namespace moebius::kernels::cuda
