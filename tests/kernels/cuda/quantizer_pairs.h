#pragma once

// A kernel for quantize_rows_test alone: the division of device/quantizer.cuh against the
// instruction sequence of IEEE division, for every pair of a block's largest element and another,
// and its two ways to a block's scale.

#include <cuda_runtime.h>

namespace moebius::kernels::cuda {

// Adds to *mismatches the pairs (x, largest) whose codes differ: `largest` all finite positive BF16
// numbers, x all of at most that size, both signs; and the scales that differ.
cudaError_t LaunchQuantizerPairs(bool power_of_two, unsigned long long* mismatches,
                                 unsigned long long* compared, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
