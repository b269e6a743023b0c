#pragma once

// CUDA's error codes as absl::Status. Any thread.

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace moebius::kernels::cuda {

// OK for cudaSuccess; otherwise Internal (ResourceExhausted for memory) naming `what` failed.
absl::Status ToStatus(cudaError_t error, absl::string_view what);

// The status of the launch just made (cudaGetLastError).
absl::Status LaunchStatus(absl::string_view kernel);

// Multiprocessors of the current device, asked for once.
int MultiprocessorCount();

}  // namespace moebius::kernels::cuda
