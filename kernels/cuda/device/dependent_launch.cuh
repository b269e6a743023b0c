#pragma once

// Kernels that start while the one before them on the stream still runs (programmatic dependent
// launch, CUDA C++ Programming Guide): launch latency and prologue are hidden behind it.
//
// The contract of a kernel launched so: it reads and writes nothing that other kernels of the
// stream write or read until WaitForPrecedingKernel() has returned, in every thread; before that
// only constants of the model. LetNextKernelStart() may be called anywhere: the next kernel's
// blocks take only what room is left, and wait in turn. Where is a matter of measurement: once
// everything is read, as a rule; at once if the blocks fill the GPU. Blocks that find half of it
// free early crowd on few multiprocessors. Kernels that know nothing of this may stand before and
// after.
//
// Data of other kernels must not be read through the read-only path (__ldg, const __restrict__):
// the compiler may move such loads above the wait.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/status.h"

namespace moebius::kernels::cuda {

__device__ __forceinline__ void WaitForPrecedingKernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void LetNextKernelStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// The same, but not before `value` is there: the compiler may move arithmetic across the other.
__device__ __forceinline__ void LetNextKernelStartAfter(uint32_t value) {
  asm volatile(
      "{\n.reg .b32 there;\nmov.b32 there, %0;\ngriddepcontrol.launch_dependents;\n}" ::"r"(value)
      : "memory");
}

// How a kernel is launched, besides its arguments.
struct LaunchShape {
  dim3 grid;
  unsigned threads = 0;     // a CTA
  size_t shared_bytes = 0;  // dynamic shared memory of a CTA; the kernel's limit is raised to it
  dim3 cluster = dim3(1, 1, 1);  // CTAs; divides the grid
  // Under the contract above. false: the kernel starts once all in front of it have ended.
  bool early_start = true;
};

template <typename... Params, typename... Arguments>
absl::Status LaunchKernel(absl::string_view name, void (*kernel)(Params...),
                          const LaunchShape& shape, cudaStream_t stream,
                          const Arguments&... arguments) {
  constexpr size_t kDefaultLimit = 48 << 10;  // of dynamic shared memory
  constexpr unsigned kPortableCluster = 8;
  if (shape.shared_bytes > kDefaultLimit) {
    RETURN_IF_ERROR(
        ToStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shape.shared_bytes)),
                 name));
  }
  const unsigned ctas = shape.cluster.x * shape.cluster.y * shape.cluster.z;
  if (ctas > kPortableCluster) {
    RETURN_IF_ERROR(ToStatus(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.early_start) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (ctas > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  }
  return ToStatus(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

template <typename Params>
absl::Status LaunchDependent(absl::string_view name, void (*kernel)(Params), dim3 grid,
                             unsigned threads, cudaStream_t stream, const Params& params) {
  return LaunchKernel(name, kernel, {grid, threads}, stream, params);
}

}  // namespace moebius::kernels::cuda
