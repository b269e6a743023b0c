#pragma once

// Warpgroup matrix multiply-accumulate of Hopper (PTX ISA, "wgmma"): D[64, N] += A[64, K] B[N,
// K]^T, float32 accumulators in the registers of 128 threads (4 warps, the first a multiple of 4).
//
// Accumulator layout: thread t of the warpgroup holds d[4 j + c], for columns 8 j .. 8 j + 7:
//   row = 16 (t / 32) + (t % 32) / 4 + 8 (c / 2),   column = 8 j + 2 (t % 4) + c % 2.
// Operands lie in shared memory in 128-byte rows swizzled as TMA's SWIZZLE_128B does: row r at r *
// 128 from a 1024-aligned base, its 16-byte chunk c at place c ^ (r % 8). A K step of 32 bytes adds
// 32 to the address.

#include <cstdint>

#include "kernels/cuda/device/wgmma_instructions.cuh"

namespace moebius::kernels::cuda {

// Makes earlier writes of accumulator registers visible to the wgmma that follow.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the committed groups are still running.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of `d` above a wait.
template <int kCount>
__device__ __forceinline__ void KeepRegisters(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// `pointer`, of which the compiler does not know how to compute it again: where it would, in a
// loop, from registers that are slow to read.
template <typename T>
__device__ __forceinline__ T* Kept(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}
// The same for a number.
__device__ __forceinline__ uint32_t Kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Descriptor of a K-major operand in 128-byte swizzled rows; `address` is a shared-memory address
// (inside the first 8-row group of a 1024-aligned tile; a K offset of a multiple of 32 bytes
// added).
__device__ __forceinline__ uint64_t KMajorDescriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (uint64_t{1} << 16) |
         (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// `descriptor` of an operand `bytes` (a multiple of 16) farther. Cheaper than another one made from
// an address, whose dependent steps stand between one wgmma and the next.
__device__ __forceinline__ uint64_t AdvanceDescriptor(uint64_t descriptor, uint32_t bytes) {
  // Shared memory ends below 256 KB: nothing is carried out of the address's 14 bits.
  return (descriptor & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// Descriptor of an MN-major 16-bit operand (...TransposedA, ...TransposedB): row k of a tile holds
// 64 consecutive values of M or N in 128 bytes, swizzled as above; the next 64 lie `group_bytes`
// farther (rows of the tile * 128; unused by an operand of 64). `address` is that of a row k that
// is a multiple of 8 in a 1024-aligned tile; a K step of 16 adds 2048.
__device__ __forceinline__ uint64_t MnMajorDescriptor(uint32_t address, uint32_t group_bytes) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         (static_cast<uint64_t>((group_bytes & 0x3ffff) >> 4) << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace moebius::kernels::cuda
