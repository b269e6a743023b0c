#include "kernels/cuda/rms_norm/rms_norm.h"

#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/norm_row.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "RmsNorm";
static_assert(kRmsNormMaxDim <= kStatisticsMaxDim);

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
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    LoadWeights<kAligned>(args.to.weight, vectors.at[v], dim, weight[v]);
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
// rows of up to 7,168 elements, leave no registers for weights that are loaded early.
template <bool kAligned, bool kShared, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) AddRmsNorm(const Args args) {
  __shared__ __align__(16) float parts[32];
  constexpr int kVectors = kStatisticsVectors;
  const int dim = args.dim, row = static_cast<int>(blockIdx.x);
  const int64_t dense = static_cast<int64_t>(row) * dim;
  const NormVectors vectors;
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
  float weight[kVectors][kVectorElements];
  constexpr WeightsAre kWeights =
      kAligned && kBlocks == 1 ? WeightsAre::kLoadedEarly : WeightsAre::kLoadedLate;
  NormalizeRow<kAligned, kWeights>(args.to, row, dim, vectors, x, weight, parts);
}

template <bool kShared>
auto SelectAddition(const RmsNormParams& p, bool aligned) {
  constexpr int kNarrow = StatisticsThreads(7168);
  if (!aligned) return AddRmsNorm<false, kShared, 1024, 1>;
  if (StatisticsThreads(p.dim) > kNarrow || p.m <= 2 * MultiprocessorCount())
    return AddRmsNorm<true, kShared, 1024, 1>;
  return AddRmsNorm<true, kShared, kNarrow, 3>;
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
