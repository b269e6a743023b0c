#pragma once

// Stores of the copy engine, from shared memory to a tensor map's matrix (PTX ISA,
// "cp.async.bulk.tensor").

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"

namespace moebius::kernels::cuda {

// Copies a box from shared memory (ordered by ProxyFence) to a tensor map's matrix, clipped to it.
// One thread stores and commits; it waits until the shared memory may be written again
// (StoresHaveRead) or until all is in memory (StoresDone).
__device__ __forceinline__ void TmaStore2d(const CUtensorMap* map, const void* from, int32_t x,
                                           int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(SharedAddress(from)), "r"(x), "r"(y)
      : "memory");
}
// Copies `bytes` (a multiple of 16, both sides 16-aligned) as they lie.
__device__ __forceinline__ void BulkStore(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(SharedAddress(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void StoresCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void StoresHaveRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// StoresHaveRead for all but the last kPending commits.
template <int kPending>
__device__ __forceinline__ void StoresHaveReadBut() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void StoresDone() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace moebius::kernels::cuda
