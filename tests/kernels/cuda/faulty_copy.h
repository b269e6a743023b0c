#pragma once

// A kernel of which one launch in many is wrong.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace moebius::kernels::cuda {

// Copies `words`; launch number `faulty` (from 0; `launches` counts them) inverts the last one.
void LaunchFaultyCopy(uint32_t* to, const uint32_t* from, size_t words, uint32_t* launches,
                      uint32_t faulty, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
