#pragma once

// The attention of a GPU that has at most 16 heads, by single CTAs: the chains of mla_attention.cu
// in another form. There a tile of 64 heads would be three quarters padding, whose products cost
// power and so hold the clock down; here heads are the narrow operand of both products.

#include <cuda.h>
#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/cuda/mla_attention/tile.cuh"

namespace moebius::kernels::cuda {

constexpr int kNarrowHeads = 16;

// Enqueues the attention of all rows, up to the merging of shared ones. Boxes of `queries` have
// kNarrowHeads rows.
absl::Status LaunchNarrowAttention(const CUtensorMap& queries, const CUtensorMap& cache,
                                   const Shape& shape, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
