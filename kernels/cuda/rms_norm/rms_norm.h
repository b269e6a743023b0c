#pragma once

// RMSNorm (kernels/linear.h) with what a layer runs right before and after it: the residual
// addition and the 1x128 quantisation of the normalised row (DeepSeek-V3 report section 3.3.2).
//
//   x   = x                                         no addition
//       = bf16(x + add)                             ResidualAddParams
//       = bf16(x + bf16(add + add_shared))          MoeResidualParams: two roundings
//   out = bf16((x * rsqrt(mean(x^2) + eps)) * weight)
//   codes, scales = the 1x128 blocks of out
//
// The sum of squares is a tree that dim alone decides (device/row_statistics.cuh); the rest follows
// kernels/reference operation by operation. So `out` differs from the reference only through the
// order of that sum, and codes are exactly the quantised `out`.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

inline constexpr int64_t kRmsNormMaxDim = 16384;

// Device pointers, borrowed until the stream has passed the launch. Strides in elements. Any
// alignment and dim is taken; rows that are not 16-aligned are slower.
struct RmsNormParams {
  int64_t m = 0;            // rows; 0 does nothing
  int64_t dim = 0;          // 1 .. kRmsNormMaxDim
  const Bf16* x = nullptr;  // [m, dim], row stride x_stride
  int64_t x_stride = 0;

  const Bf16* add = nullptr;         // [m, dim] dense; nullptr = no addition
  const Bf16* add_shared = nullptr;  // [m, dim] dense; nullptr = `add` alone
  Bf16* sum = nullptr;  // [m, dim] dense, set with `add`: the row after the addition; may be x

  // Constant of the model: read before the kernel in front on the stream has ended.
  const float* weight = nullptr;  // [dim]
  float eps = 1e-6f;

  // At least one of the two outputs.
  Bf16* out = nullptr;  // [m, dim], row stride out_stride; may be x, add or sum
  int64_t out_stride = 0;
  E4m3* codes = nullptr;    // [m, dim] dense
  float* scales = nullptr;  // [m, ceil(dim / 128)] dense, set with `codes`
  bool power_of_two_scales = false;
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
