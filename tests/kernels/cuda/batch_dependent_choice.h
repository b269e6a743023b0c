#pragma once

// Deliberate mistakes for the tests of choosing kernels: results that depend on the batch, so that
// the row-rule tests can show that they find such a thing.

#include <cuda_runtime.h>

#include <cstdint>

namespace moebius::kernels::cuda {

// Normalises gate weights with a sum that begins at a slot that follows the row's place.
cudaError_t LaunchNormaliseByPlace(float* weights, int64_t m, int top_k, cudaStream_t stream);

// Log-sum-exp of each row in float32, in as many parts as there are rows (up to 64).
cudaError_t LaunchLogSumByBatch(const float* logits, int64_t m, int64_t vocab, int64_t stride,
                                float* log_sums, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
