#pragma once

// Residual additions (kernels/linear.h, ResidualAddParams and MoeResidualParams), bit-equal to
// kernels/reference:
//   h = bf16(h + y)                        shared == nullptr
//   h = bf16(h + bf16(y + shared))         two roundings
// For layers whose next step is not a norm; RmsNorm and Combine can do it on the way.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

// Device pointers, borrowed until the stream has passed the launch.
struct ResidualParams {
  int64_t m = 0;  // rows; 0 does nothing
  int64_t dim = 0;
  Bf16* h = nullptr;             // [m, dim] dense
  const Bf16* y = nullptr;       // [m, dim] dense; the routed sum of an MoE layer
  const Bf16* shared = nullptr;  // [m, dim] dense, or nullptr
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchResidual(const ResidualParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
