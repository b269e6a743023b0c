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

}  // namespace moebius::kernels::cuda
