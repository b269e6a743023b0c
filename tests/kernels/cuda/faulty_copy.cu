#include "tests/kernels/cuda/faulty_copy.h"

namespace moebius::kernels::cuda {
namespace {

__global__ void FaultyCopy(uint32_t* to, const uint32_t* from, size_t words, uint32_t* launches,
                           uint32_t faulty) {
  const bool wrong = *launches == faulty;
  __syncthreads();
  for (size_t i = threadIdx.x; i < words; i += blockDim.x)
    to[i] = wrong && i == words - 1 ? ~from[i] : from[i];
  if (threadIdx.x == 0) ++*launches;
}

}  // namespace

void LaunchFaultyCopy(uint32_t* to, const uint32_t* from, size_t words, uint32_t* launches,
                      uint32_t faulty, cudaStream_t stream) {
  FaultyCopy<<<1, 256, 0, stream>>>(to, from, words, launches, faulty);
}

}  // namespace moebius::kernels::cuda
