#include "kernels/cuda/combine/combine_norm.h"

#include "base/status_macros.h"
#include "kernels/cuda/combine/combine_arguments.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/canonical_sum.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/norm_row.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "CombineNorm";
constexpr int kThreads = StatisticsThreads(kCombineNormMaxDim);
static_assert(kThreads == 512, "128 registers a thread");

struct Args {
  ExpertRows in;
  int dim;
  uint16_t* routed;
  const uint16_t* shared;
  uint16_t* h;
  NormOutputs to;
};

// A block takes a token.
template <bool kWhole>
__global__ void __launch_bounds__(kThreads) CombineNorm(const Args args) {
  __shared__ __align__(16) float parts[32];
  constexpr int kVectors = kStatisticsVectors;
  constexpr bool kAligned = true;
  WaitForPrecedingKernel();
  const int token = static_cast<int>(blockIdx.x), dim = args.dim;
  const int64_t dense = static_cast<int64_t>(token) * dim;
  const NormVectors vectors;
  RowVector h[kVectors], shared[kVectors], x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    shared[v] = LoadVector<kAligned>(args.shared + dense, vectors.at[v], dim);
    h[v] = LoadVector<kAligned>(args.h + dense, vectors.at[v], dim);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    x[v] = CanonicalSum<kAligned, kWhole>(args.in, token, vectors.at[v], dim);
  LetNextKernelStart();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (args.routed != nullptr)
      StoreVector<kAligned>(x[v], args.routed + dense, vectors.at[v], dim);
    // Vectors past the row's end must be zero in the statistics.
    x[v] = WithoutTail<kAligned>(AddVectors(h[v], AddVectors(x[v], shared[v])), vectors.at[v], dim);
    StoreVector<kAligned>(x[v], args.h + dense, vectors.at[v], dim);
  }
  float weight[kVectors][kVectorElements];
  NormalizeRow<kAligned, WeightsAre::kLoadedEarly>(args.to, token, dim, vectors, x, weight, parts);
}

absl::Status Validate(const CombineNormParams& p) {
  RETURN_IF_ERROR(ValidateCombine(kOp, p.combine));
  RETURN_IF_ERROR(CheckRange(kOp, "dim", p.combine.dim, 1, kCombineNormMaxDim));
  RETURN_IF_ERROR(CheckPointer(kOp, "shared", p.combine.shared, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "weight", p.weight, 4));
  if (p.out == nullptr && p.codes == nullptr) return Refuse(kOp, "neither out nor codes is set");
  if (p.codes != nullptr) RETURN_IF_ERROR(CheckPointer(kOp, "scales", p.scales, 4));
  const int64_t dim = p.combine.dim;
  if (!CombineIsAligned(p.combine) || !VectorsAreAligned(p.out, dim, dim) ||
      !CodesAreAligned(p.codes, dim, dim) || !VectorsAreAligned(p.weight, 8, 8)) {
    return Refuse(kOp, "rows are not 16-aligned");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status LaunchCombineNorm(const CombineNormParams& p, cudaStream_t stream) {
  if (p.combine.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const int64_t dim = p.combine.dim;
  const Args args{ToExpertRows(p.combine),
                  static_cast<int>(dim),
                  reinterpret_cast<uint16_t*>(p.combine.out),
                  reinterpret_cast<const uint16_t*>(p.combine.shared),
                  reinterpret_cast<uint16_t*>(p.combine.h),
                  {p.weight, p.eps, reinterpret_cast<uint16_t*>(p.out), dim,
                   reinterpret_cast<uint8_t*>(p.codes), p.scales, p.power_of_two_scales}};
  const auto kernel =
      p.combine.top_k % kCanonicalRowsInFlight == 0 ? CombineNorm<true> : CombineNorm<false>;
  return LaunchDependent(kOp, kernel, dim3(static_cast<unsigned>(p.combine.m)),
                         static_cast<unsigned>(StatisticsThreads(dim)), stream, args);
}

}  // namespace moebius::kernels::cuda
