#pragma once

// A kernel that stands in front of another: it lets that one start as early as it may, and writes
// late.

#include <cuda_runtime.h>

#include <cstddef>

namespace moebius::kernels::cuda {

// Copies `bytes` after about 100 microseconds, one block.
void LaunchSlowCopy(void* to, const void* from, size_t bytes, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
