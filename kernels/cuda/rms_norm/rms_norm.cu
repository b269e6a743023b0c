#include "kernels/cuda/rms_norm/rms_norm.h"

#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/quantizer.cuh"
#include "kernels/cuda/device/row_statistics.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "RmsNorm";
static_assert(kRmsNormMaxDim <= kStatisticsMaxDim);

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

template <bool kAligned>
__device__ __forceinline__ void LoadRowWeights(
    const NormOutputs& to, const NormVectors& vectors, int dim,
    float (&weight)[kStatisticsVectors][kVectorElements]) {
#pragma unroll
  for (int v = 0; v < kStatisticsVectors; ++v)
    LoadWeights<kAligned>(to.weight, vectors.at[v], dim, weight[v]);
}

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
  if constexpr (kWeights == WeightsAre::kLoadedEarly)
    LoadRowWeights<kAligned>(to, vectors, dim, weight);
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

struct Args {
  int m, dim;
  const uint16_t* x;
  int64_t x_stride;
  const uint16_t* add;
  const uint16_t* add_shared;
  uint16_t* sum;
  NormOutputs to;
};

template <bool kAligned>
__device__ __forceinline__ void LoadRow(const uint16_t* row, const NormVectors& vectors, int dim,
                                        RowVector (&x)[kStatisticsVectors]) {
#pragma unroll
  for (int v = 0; v < kStatisticsVectors; ++v) x[v] = LoadVector<kAligned>(row, vectors.at[v], dim);
}

// A block takes rows blockIdx.x, + gridDim.x, .., weights in registers, the next row on its way.
template <bool kAligned>
__global__ void __launch_bounds__(1024) RmsNorm(const Args args) {
  __shared__ __align__(16) float parts[2][32];
  constexpr int kVectors = kStatisticsVectors;
  const int dim = args.dim, rows_apart = static_cast<int>(gridDim.x);
  const NormVectors vectors;
  float weight[kVectors][kVectorElements];
  LoadRowWeights<kAligned>(args.to, vectors, dim, weight);
  WaitForPrecedingKernel();

  int row = static_cast<int>(blockIdx.x), buffer = 0;
  RowVector next[kVectors];
  LoadRow<kAligned>(args.x + row * args.x_stride, vectors, dim, next);
  for (; row < args.m; row += rows_apart) {
    RowVector x[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) x[v] = next[v];
    if (row + rows_apart < args.m) {
      LoadRow<kAligned>(args.x + (row + rows_apart) * args.x_stride, vectors, dim, next);
    } else {
      LetNextKernelStart();
    }
    // Two buffers in turn: a slow warp may still read the last row's parts, none those before.
    NormalizeRow<kAligned, WeightsAre::kGiven>(args.to, row, dim, vectors, x, weight,
                                               parts[buffer]);
    buffer ^= 1;
  }
}

// A block takes one row. kBlocks blocks of kThreads threads share a multiprocessor: three, for many
// rows, leave no registers for weights that are loaded early.
template <bool kAligned, bool kShared, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) AddRmsNorm(const Args args) {
  __shared__ __align__(16) float parts[32];
  constexpr int kVectors = kStatisticsVectors;
  const int dim = args.dim, row = static_cast<int>(blockIdx.x);
  const int64_t dense = static_cast<int64_t>(row) * dim;
  constexpr WeightsAre kWeights = !kAligned || kBlocks == 3 ? WeightsAre::kLoadedLate
                                  : kThreads <= 512         ? WeightsAre::kGiven
                                                            : WeightsAre::kLoadedEarly;
  const NormVectors vectors;
  float weight[kVectors][kVectorElements];
  if constexpr (kWeights == WeightsAre::kGiven)
    LoadRowWeights<kAligned>(args.to, vectors, dim, weight);
  WaitForPrecedingKernel();
  RowVector x[kVectors], add[kVectors], shared[kVectors];
  LoadRow<kAligned>(args.x + row * args.x_stride, vectors, dim, x);
  LoadRow<kAligned>(args.add + dense, vectors, dim, add);
  if constexpr (kShared) LoadRow<kAligned>(args.add_shared + dense, vectors, dim, shared);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kShared) add[v] = AddVectors(add[v], shared[v]);
    x[v] = AddVectors(x[v], add[v]);
  }
  LetNextKernelStart();
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    StoreVector<kAligned>(x[v], args.sum + dense, vectors.at[v], dim);
  NormalizeRow<kAligned, kWeights>(args.to, row, dim, vectors, x, weight, parts);
}

template <bool kShared>
auto SelectAddition(const RmsNormParams& p, bool aligned) {
  constexpr int kNarrow = StatisticsThreads(7168);
  if (!aligned) return AddRmsNorm<false, kShared, 1024, 1>;
  if (StatisticsThreads(p.dim) > kNarrow) return AddRmsNorm<true, kShared, 1024, 1>;
  const bool few = p.m <= 2 * MultiprocessorCount();
  return few ? AddRmsNorm<true, kShared, kNarrow, 1> : AddRmsNorm<true, kShared, kNarrow, 3>;
}

auto Select(const RmsNormParams& p, bool aligned) {
  if (p.add_shared != nullptr) return SelectAddition<true>(p, aligned);
  if (p.add != nullptr) return SelectAddition<false>(p, aligned);
  return aligned ? RmsNorm<true> : RmsNorm<false>;
}

absl::Status Validate(const RmsNormParams& p) {
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "dim", p.dim, 1, kRmsNormMaxDim));
  RETURN_IF_ERROR(CheckRange(kOp, "x_stride", p.x_stride, p.dim, INT64_MAX));
  RETURN_IF_ERROR(CheckPointer(kOp, "x", p.x, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "weight", p.weight, 4));
  if (p.add_shared != nullptr) RETURN_IF_ERROR(CheckPointer(kOp, "add", p.add, 2));
  if (p.add != nullptr) RETURN_IF_ERROR(CheckPointer(kOp, "sum", p.sum, 2));
  if (p.add == nullptr && p.sum != nullptr) return Refuse(kOp, "sum is set without add");
  if (p.out == nullptr && p.codes == nullptr) return Refuse(kOp, "neither out nor codes is set");
  if (p.out != nullptr)
    RETURN_IF_ERROR(CheckRange(kOp, "out_stride", p.out_stride, p.dim, INT64_MAX));
  if (p.codes != nullptr) RETURN_IF_ERROR(CheckPointer(kOp, "scales", p.scales, 4));
  return absl::OkStatus();
}

bool Aligned(const RmsNormParams& p) {
  return VectorsAreAligned(p.x, p.x_stride, p.dim) && VectorsAreAligned(p.add, p.dim, p.dim) &&
         VectorsAreAligned(p.add_shared, p.dim, p.dim) && VectorsAreAligned(p.sum, p.dim, p.dim) &&
         (p.out == nullptr || VectorsAreAligned(p.out, p.out_stride, p.dim)) &&
         CodesAreAligned(p.codes, p.dim, p.dim) && VectorsAreAligned(p.weight, 8, 8);
}

}  // namespace

absl::Status LaunchRmsNorm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const Args args{static_cast<int>(p.m),
                  static_cast<int>(p.dim),
                  reinterpret_cast<const uint16_t*>(p.x),
                  p.x_stride,
                  reinterpret_cast<const uint16_t*>(p.add),
                  reinterpret_cast<const uint16_t*>(p.add_shared),
                  reinterpret_cast<uint16_t*>(p.sum),
                  {p.weight, p.eps, reinterpret_cast<uint16_t*>(p.out), p.out_stride,
                   reinterpret_cast<uint8_t*>(p.codes), p.scales, p.power_of_two_scales}};
  const int threads = StatisticsThreads(p.dim);
  // Without an addition as many blocks as are resident together, each with a chain of rows.
  const int64_t resident = MultiprocessorCount() * std::max(1, std::min(16, 1024 / threads));
  const dim3 grid(static_cast<unsigned>(p.add != nullptr ? p.m : std::min(p.m, resident)));
  return LaunchDependent(kOp, Select(p, Aligned(p)), grid, static_cast<unsigned>(threads), stream,
                         args);
}

}  // namespace moebius::kernels::cuda
