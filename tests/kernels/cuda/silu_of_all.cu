#include "tests/kernels/cuda/silu_of_all.h"

#include "kernels/cuda/expert_ffn/tile_swiglu.cuh"
#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

struct Counts {
  unsigned long long compared, different;
  float example;
};

constexpr unsigned kThreads = 256, kBlocks = 1 << 14;

// Of eight gates, as SwiGluInPlace has them, against one by one; element `replaced` (8: none) is
// made NaN before, and not compared.
__device__ void CompareGroup(uint32_t group, int replaced, unsigned long long* compared,
                             unsigned long long* different, Counts* counts) {
  float gate[8], up[8], expected[8];
  for (int k = 0; k < 8; ++k) {
    gate[k] = k == replaced ? __uint_as_float(0x7fc00000u) : __uint_as_float(group * 8 + k);
    up[k] = 1.0f;
    expected[k] = __fdiv_rn(gate[k], __fadd_rn(1.0f, ExactExp(-gate[k])));
  }
  SwiGluInPlace(gate, up);
  for (int k = 0; k < 8; ++k) {
    if (k == replaced) continue;
    ++*compared;
    const bool both_nan = isnan(expected[k]) && isnan(gate[k]);
    if (both_nan || __float_as_uint(expected[k]) == __float_as_uint(gate[k])) continue;
    ++*different;
    counts->example = __uint_as_float(group * 8 + k);
  }
}

__global__ void CompareSilu(Counts* counts) {
  unsigned long long compared = 0, different = 0;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  for (uint32_t group = thread; group < 1u << 29; group += kBlocks * kThreads) {
    CompareGroup(group, 8, &compared, &different, counts);
    if (group % 8 == 0) CompareGroup(group, group / 8 % 8, &compared, &different, counts);
  }
  atomicAdd(&counts->compared, compared);
  if (different != 0) atomicAdd(&counts->different, different);
}

}  // namespace

SiluDifferences CompareSiluOfAllGates() {
  const DeviceBuffer<Counts> counts(std::vector<Counts>(1, Counts{}));
  CompareSilu<<<kBlocks, kThreads>>>(counts.get());
  ExpectCudaOk(cudaDeviceSynchronize(), "CompareSilu");
  const Counts found = counts.Download()[0];
  return {found.compared, found.different, found.example};
}

}  // namespace moebius::kernels::cuda
