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
#include "kernels/cuda/device/launch.h"

namespace moebius::kernels::cuda {

__device__ __forceinline__ void WaitForPrecedingKernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// LetNextKernelStart, but not before `value` is there: arithmetic may move across the other.
__device__ __forceinline__ void LetNextKernelStartAfter(uint32_t value) {
  asm volatile(
      "{\n.reg .b32 there;\nmov.b32 there, %0;\ngriddepcontrol.launch_dependents;\n}" ::"r"(value)
      : "memory");
}
__device__ __forceinline__ void LetNextKernelStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Launch of such a kernel, with `shared_bytes` of dynamic shared memory.
template <typename Params>
absl::Status LaunchDependent(absl::string_view name, void (*kernel)(Params), dim3 grid,
                             unsigned threads, cudaStream_t stream, const Params& params,
                             int shared_bytes = 0) {
  LaunchShape shape;
  shape.grid = grid;
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  shape.overlaps = true;
  return Launch(name, kernel, shape, stream, params);
}

}  // namespace moebius::kernels::cuda
