#pragma once

// The end of one MoE layer and the start of the next in one kernel: the canonical sum of each
// token's expert rows (combine.h), the residual h = bf16(h + bf16(routed + shared)), RMSNorm of h
// with the next layer's weight and the 1x128 quantisation of it (../rms_norm/rms_norm.h). h is read
// and written once, and the routed sum never leaves registers. Every bit is that of LaunchCombine
// followed by LaunchRmsNorm.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"
#include "kernels/cuda/combine/combine.h"

namespace moebius::kernels::cuda {

inline constexpr int64_t kCombineNormMaxDim = 8192;

// Device pointers, borrowed until the stream has passed the launch.
struct CombineNormParams {
  // With shared and h; out may be nullptr. dim: a multiple of 8 up to kCombineNormMaxDim.
  CombineParams combine;

  // Constant of the model: read before the kernel in front on the stream has ended.
  const float* weight = nullptr;  // [dim]
  float eps = 1e-6f;
  // At least one of the two outputs.
  Bf16* out = nullptr;      // [m, dim] dense
  E4m3* codes = nullptr;    // [m, dim] dense
  float* scales = nullptr;  // [m, ceil(dim / 128)] dense, set with `codes`
  bool power_of_two_scales = false;
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchCombineNorm(const CombineNormParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
