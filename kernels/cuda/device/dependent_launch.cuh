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

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/cuda/device/status.h"

namespace moebius::kernels::cuda {

__device__ __forceinline__ void WaitForPrecedingKernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void LetNextKernelStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// `shared_bytes` of dynamic shared memory, which the kernel must have been allowed to use.
template <typename Params>
absl::Status LaunchDependent(absl::string_view name, void (*kernel)(Params), dim3 grid,
                             unsigned threads, cudaStream_t stream, const Params& params,
                             size_t shared_bytes = 0) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return ToStatus(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace moebius::kernels::cuda
