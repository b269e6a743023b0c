#pragma once

// A kernel that writes down how it was launched.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"

namespace moebius::kernels::cuda {

struct LaunchRecord {
  uint32_t shared_bytes = 0;  // dynamic
  uint32_t cluster[3] = {};   // CTAs
  uint32_t grid[3] = {};      // CTAs
  uint32_t seen = 0;          // what `*word` held
};

// Launches it with LaunchKernel (kernels/cuda/device/dependent_launch.cuh). It reads `word` without
// waiting for the kernel in front. Device pointers.
absl::Status LaunchProbe(dim3 grid, size_t shared_bytes, dim3 cluster, bool early_start,
                         const uint32_t* word, LaunchRecord* record, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
