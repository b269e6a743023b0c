#pragma once

// RMSNorm of a row in registers and what is stored of it: the part that RmsNorm and CombineNorm
// share, so that both give the same bits. The block has StatisticsThreads(dim) threads; thread t
// holds vectors t and t + T.

#include <cstdint>

#include "kernels/cuda/device/quantizer.cuh"
#include "kernels/cuda/device/row_statistics.cuh"

namespace moebius::kernels::cuda {

struct NormOutputs {
  const float* weight;  // [dim]
  float eps;
  uint16_t* out;  // [m, dim], row stride out_stride; or nullptr
  int64_t out_stride;
  uint8_t* codes;  // [m, dim] dense; or nullptr
  float* scales;
  bool power_of_two;
};

// The elements at which a thread's vectors begin.
struct NormVectors {
  int at[kStatisticsVectors];
  __device__ __forceinline__ NormVectors() {
#pragma unroll
    for (int v = 0; v < kStatisticsVectors; ++v)
      at[v] = static_cast<int>(threadIdx.x + v * blockDim.x) * kVectorElements;
  }
};

// Where a thread's weights come from: the caller has them; loaded before the statistics, to hide
// their latency; or after, to save registers.
enum class WeightsAre { kGiven, kLoadedEarly, kLoadedLate };

// `parts`: see FoldBlock.
template <bool kAligned, WeightsAre kWeights>
__device__ __forceinline__ void NormalizeRow(const NormOutputs& to, int row, int dim,
                                             const NormVectors& vectors,
                                             const RowVector (&x)[kStatisticsVectors],
                                             float (&weight)[kStatisticsVectors][kVectorElements],
                                             float* parts) {
  if constexpr (kWeights == WeightsAre::kLoadedEarly) {
#pragma unroll
    for (int v = 0; v < kStatisticsVectors; ++v)
      LoadWeights<kAligned>(to.weight, vectors.at[v], dim, weight[v]);
  }
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kStatisticsVectors; ++v) squares = AddSquares(x[v], squares);
  const float inverse = InverseRms(FoldBlock(squares, parts), dim, to.eps);
  const int64_t dense = static_cast<int64_t>(row) * dim;
#pragma unroll
  for (int v = 0; v < kStatisticsVectors; ++v) {
    const int at = vectors.at[v];
    if constexpr (kWeights == WeightsAre::kLoadedLate)
      LoadWeights<kAligned>(to.weight, at, dim, weight[v]);
    const RowVector normed = RoundedVector(
        [&](int i) { return __fmul_rn(__fmul_rn(x[v].At(i), inverse), weight[v][i]); });
    if (to.out != nullptr) StoreVector<kAligned>(normed, to.out + row * to.out_stride, at, dim);
    if (to.codes != nullptr) {
      // What lies past the end must not reach the last block's scale: 0 * infinity is NaN.
      QuantizeVector<kAligned>(WithoutTail<kAligned>(normed, at, dim), at, dim, to.power_of_two,
                               to.codes + dense,
                               to.scales + static_cast<int64_t>(row) * ((dim + 127) / 128));
    }
  }
}

}  // namespace moebius::kernels::cuda
