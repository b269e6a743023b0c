#pragma once

// A kernel that writes down how it was launched.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/device/launch.h"

namespace moebius::kernels::cuda {

struct LaunchRecord {
  uint32_t shared_bytes = 0;  // dynamic
  uint32_t cluster[3] = {};   // CTAs
  uint32_t grid[3] = {};      // CTAs
  uint32_t seen = 0;          // what `*word` held
};

// Launches it, one thread a CTA. It reads `word` without waiting for the kernel in front. Device
// pointers.
absl::Status LaunchProbe(const LaunchShape& shape, const uint32_t* word, LaunchRecord* record,
                         cudaStream_t stream);

}  // namespace moebius::kernels::cuda
