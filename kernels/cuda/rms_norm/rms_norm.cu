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

struct Rows {
  int m, dim;
  const uint16_t* x;
  int64_t x_stride;
  const uint16_t* add;
  const uint16_t* add_shared;
  uint16_t* sum;
  const float* weight;
  float eps;
  uint16_t* out;
  int64_t out_stride;
  uint8_t* codes;
  float* scales;
  bool power_of_two;
};

// A block takes rows blockIdx.x, + gridDim.x, ..: the weights stay in registers.
template <bool kAligned>
__global__ void __launch_bounds__(1024) RmsNorm(const Rows rows) {
  __shared__ __align__(16) float parts[2][32];
  constexpr int kVectors = kStatisticsVectors;
  const int dim = rows.dim;
  int at[kVectors];
  float weight[kVectors][kVectorElements];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    at[v] = static_cast<int>(threadIdx.x + v * blockDim.x) * kVectorElements;
    LoadWeights<kAligned>(rows.weight, at[v], dim, weight[v]);
  }
  LetNextKernelStart();
  WaitForPrecedingKernel();

  int buffer = 0;
  for (int row = static_cast<int>(blockIdx.x); row < rows.m; row += static_cast<int>(gridDim.x)) {
    const int64_t dense = static_cast<int64_t>(row) * dim;
    RowVector x[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      x[v] = LoadVector<kAligned>(rows.x + row * rows.x_stride, at[v], dim);
    if (rows.add != nullptr) {
      RowVector add[kVectors], shared[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        add[v] = LoadVector<kAligned>(rows.add + dense, at[v], dim);
      if (rows.add_shared != nullptr) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
          shared[v] = LoadVector<kAligned>(rows.add_shared + dense, at[v], dim);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) add[v] = AddVectors(add[v], shared[v]);
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        x[v] = AddVectors(x[v], add[v]);
        StoreVector<kAligned>(x[v], rows.sum + dense, at[v], dim);
      }
    }
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) squares = AddSquares(x[v], squares);
    // Two buffers in turn: a slow warp may still read the last row's parts, none those before.
    const float inverse = InverseRms(FoldBlock(squares, parts[buffer]), dim, rows.eps);
    buffer ^= 1;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const RowVector normed = RoundedVector(
          [&](int i) { return __fmul_rn(__fmul_rn(x[v].At(i), inverse), weight[v][i]); });
      if (rows.out != nullptr)
        StoreVector<kAligned>(normed, rows.out + row * rows.out_stride, at[v], dim);
      if (rows.codes != nullptr) {
        // What lies past the end must not reach the last block's scale: 0 * infinity is NaN.
        QuantizeVector<kAligned>(WithoutTail<kAligned>(normed, at[v], dim), at[v], dim,
                                 rows.power_of_two, rows.codes + dense,
                                 rows.scales + static_cast<int64_t>(row) * ((dim + 127) / 128));
      }
    }
  }
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
  Rows rows;
  rows.m = static_cast<int>(p.m);
  rows.dim = static_cast<int>(p.dim);
  rows.x = reinterpret_cast<const uint16_t*>(p.x);
  rows.x_stride = p.x_stride;
  rows.add = reinterpret_cast<const uint16_t*>(p.add);
  rows.add_shared = reinterpret_cast<const uint16_t*>(p.add_shared);
  rows.sum = reinterpret_cast<uint16_t*>(p.sum);
  rows.weight = p.weight;
  rows.eps = p.eps;
  rows.out = reinterpret_cast<uint16_t*>(p.out);
  rows.out_stride = p.out_stride;
  rows.codes = reinterpret_cast<uint8_t*>(p.codes);
  rows.scales = p.scales;
  rows.power_of_two = p.power_of_two_scales;

  const int threads = StatisticsThreads(p.dim);
  // As many blocks as are resident together.
  const int64_t per_processor = std::max(1, std::min(16, 1024 / threads));
  const dim3 grid(static_cast<unsigned>(std::min(p.m, MultiprocessorCount() * per_processor)));
  const auto kernel = Aligned(p) ? RmsNorm<true> : RmsNorm<false>;
  return LaunchDependent(kOp, kernel, grid, static_cast<unsigned>(threads), stream, rows);
}

}  // namespace moebius::kernels::cuda
