#pragma once

// From float32 accumulators to rows of BF16.

#include <cstdint>

namespace moebius::kernels::cuda {

// Two sums as BF16, nearest even, `low` in the low half. A sum that is NaN becomes the quiet NaN of
// base/float_formats.h: the conversion makes 0x7fff of it, a larger signed number than any other
// result, which the minimum replaces. (Sums of the multiply-adds here are NaN with the sign clear.)
__device__ __forceinline__ uint32_t Bf16Pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  asm("min.s16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x7fc07fc0u));
  return pair;
}

// 8 x 8 matrices of 16-bit elements to shared memory: thread t holds columns 2 (t % 4) and the next
// of row t / 4 of each. Row i of matrix q goes to the `address` of thread 8 q + i; Transposed:
// column i.
__device__ __forceinline__ void StoreMatrices4(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void StoreMatrices2Transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(a), "r"(b)
               : "memory");
}

}  // namespace moebius::kernels::cuda
