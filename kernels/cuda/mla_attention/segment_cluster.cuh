#pragma once

// A segment computed by a cluster of CTAs instead of one: for launches with few segments, which
// would leave most multiprocessors idle. The same chains, so the same bits.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/mla_attention/tile.cuh"

namespace moebius::kernels::cuda {

// The CTAs of a cluster for so many segments (rows * segments of a row * tiles of 64 heads): the
// most, of 8, 4 and 2, of which all clusters run at once; 1 where single CTAs are faster.
int ClusterCtas(int64_t segments);

// Enqueues all of the attention with clusters of `ctas`.
absl::Status LaunchSegmentClusters(int ctas, const CUtensorMap& queries, const CUtensorMap& cache,
                                   const Shape& shape, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
