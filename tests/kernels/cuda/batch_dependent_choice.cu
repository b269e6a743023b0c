#include "tests/kernels/cuda/batch_dependent_choice.h"

namespace moebius::kernels::cuda {
namespace {

__global__ void NormaliseByPlace(float* weights, int top_k) {
  float* const row = weights + static_cast<int64_t>(blockIdx.x) * top_k;
  float sum = 0.0f;
  for (int j = 0; j < top_k; ++j) sum += row[(static_cast<int>(blockIdx.x) + j) % top_k];
  for (int j = 0; j < top_k; ++j) row[j] /= sum;
}

__global__ void LogSumByBatch(const float* logits, int64_t vocab, int64_t stride, float* log_sums) {
  const int parts = static_cast<int>(min(gridDim.x, 64u));
  const float* const row = logits + blockIdx.x * stride;
  float total = 0.0f;
  for (int part = 0; part < parts; ++part) {
    float sum = 0.0f;
    for (int64_t i = part; i < vocab; i += parts) sum += expf(row[i]);
    total += sum;
  }
  log_sums[blockIdx.x] = logf(total);
}

}  // namespace

cudaError_t LaunchNormaliseByPlace(float* weights, int64_t m, int top_k, cudaStream_t stream) {
  NormaliseByPlace<<<static_cast<unsigned>(m), 1, 0, stream>>>(weights, top_k);
  return cudaGetLastError();
}

cudaError_t LaunchLogSumByBatch(const float* logits, int64_t m, int64_t vocab, int64_t stride,
                                float* log_sums, cudaStream_t stream) {
  LogSumByBatch<<<static_cast<unsigned>(m), 1, 0, stream>>>(logits, vocab, stride, log_sums);
  return cudaGetLastError();
}

}  // namespace moebius::kernels::cuda
