#include "kernels/cuda/device/dependent_launch.cuh"
#include "tests/kernels/cuda/launch_probe.h"

namespace moebius::kernels::cuda {
namespace {

__global__ void Probe(const uint32_t* word, LaunchRecord* record) {
  extern __shared__ uint32_t shared[];
  LaunchRecord found;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(found.shared_bytes));
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(found.cluster[0]));
  asm("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(found.cluster[1]));
  asm("mov.u32 %0, %%cluster_nctaid.z;" : "=r"(found.cluster[2]));
  found.grid[0] = gridDim.x;
  found.grid[1] = gridDim.y;
  found.grid[2] = gridDim.z;
  // Through the last word, which only a CTA with all of its shared memory has.
  uint32_t* const last = shared + (found.shared_bytes / 4 - 1);
  *last = *word;
  found.seen = *last;
  WaitForPrecedingKernel();
  if (blockIdx.x + blockIdx.y + blockIdx.z == 0) *record = found;
}

}  // namespace

absl::Status LaunchProbe(const LaunchShape& shape, const uint32_t* word, LaunchRecord* record,
                         cudaStream_t stream) {
  return Launch("Probe", Probe, shape, stream, word, record);
}

}  // namespace moebius::kernels::cuda
