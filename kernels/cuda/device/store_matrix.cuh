#pragma once

// 8 x 8 matrices of 16-bit elements, of which thread t of a warp holds row t / 4, columns 2 (t % 4)
// and the next (PTX ISA, "stmatrix", "movmatrix").

#include <cstdint>

namespace moebius::kernels::cuda {

// To shared memory. Row i of matrix q goes to the `address` of thread 8 q + i; Transposed: column
// i.
__device__ __forceinline__ void StoreMatrices4(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void StoreMatrices4Transposed(uint32_t address, uint32_t a, uint32_t b,
                                                         uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}
__device__ __forceinline__ void StoreMatrices2Transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(a), "r"(b)
               : "memory");
}

__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

}  // namespace moebius::kernels::cuda
