#pragma once

// SwiGLU of dense layers and shared experts (kernels/linear.h, SwiGluParams) with the 1x128
// quantisation that the down projection of FP8 models reads (DeepSeek-V3 report section 3.3.2):
//   out = bf16((gate / (1 + exp(-gate))) * up), in float32 with one rounding
//   codes, scales = the 1x128 blocks of out
// exp is device/exp.cuh, whose bits are those of kernels/cpu; kernels/reference uses the C
// library's, so `out` is within one unit in the last place of it. Codes are exactly the quantised
// `out`.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

// Device pointers, borrowed until the stream has passed the launch. Strides in elements.
struct SwiGluParams {
  int64_t m = 0;               // rows; 0 does nothing
  int64_t dim = 0;             // 1 .. 2^20
  const Bf16* gate = nullptr;  // [m, dim], row stride in_stride
  const Bf16* up = nullptr;    // [m, dim], row stride in_stride: halves of one matrix, or two
  int64_t in_stride = 0;
  // At least one of the two outputs.
  Bf16* out = nullptr;      // [m, dim] dense; may be gate or up if in_stride is dim
  E4m3* codes = nullptr;    // [m, dim] dense
  float* scales = nullptr;  // [m, ceil(dim / 128)] dense, set with `codes`
  bool power_of_two_scales = false;
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
