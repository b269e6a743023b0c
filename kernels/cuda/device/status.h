#pragma once

// CUDA's error codes as absl::Status. Any thread.

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace moebius::kernels::cuda {

// OK for cudaSuccess; otherwise Internal (ResourceExhausted for memory) naming `what` failed.
absl::Status ToStatus(cudaError_t error, absl::string_view what);

// Multiprocessors of the current device, asked for until it is known. Where it can't be told those
// of an H200: what is launched then fails, and says why.
int MultiprocessorCount();

}  // namespace moebius::kernels::cuda
