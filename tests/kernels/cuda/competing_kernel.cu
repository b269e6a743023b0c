#include <cuda_runtime.h>

#include <cstdint>

namespace moebius::kernels::cuda {
namespace {

// Small blocks that read and write L2 until told to stop, for at most about ten seconds. Each
// counts its rounds. All of it is device memory: blocks that poll the host's slow what shares their
// multiprocessor down tens of times (a cluster of the sampler from 7 to 560 us).
__global__ void Compete(const volatile int* stop, volatile uint32_t* rounds, float* sink) {
  float value = static_cast<float>(threadIdx.x);
  const long long began = clock64();
  for (uint32_t round = 1; *stop == 0 && clock64() - began < 20'000'000'000LL; ++round) {
    for (int i = 0; i < 64; ++i) {
      const int at = (blockIdx.x * 4099 + threadIdx.x * 17 + i * 1031) & ((1 << 18) - 1);
      value = fmaf(value, 0.5f, sink[at]);
      sink[at] = value;
    }
    if (threadIdx.x == 0) rounds[blockIdx.x] = round;
  }
}

}  // namespace

// A multiprocessor that is busy keeps its division of L1 and shared memory. With the one that the
// driver would choose for these blocks, which use none, most of it would be L1, and blocks that
// need much shared memory (clusters of them above all) would wait for these to end.
cudaError_t LaunchCompetingKernel(int blocks, const volatile int* stop, volatile uint32_t* rounds,
                                  float* sink, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      Compete, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  Compete<<<static_cast<unsigned>(blocks), 64, 0, stream>>>(stop, rounds, sink);
  return cudaGetLastError();
}

}  // namespace moebius::kernels::cuda
