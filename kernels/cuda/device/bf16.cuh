#pragma once

// BF16 in device code, as raw bits: the conversions of base/float_formats.h.

#include <cstdint>

namespace moebius::kernels::cuda {

// A pair is two neighbours in memory, the first in the low half.
__device__ __forceinline__ float LowToFloat(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float HighToFloat(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// Nearest even; a NaN keeps its sign and becomes the quiet NaN of base/float_formats.h.
__device__ __forceinline__ uint16_t RoundToBf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | 0x7fc0u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// RoundToBf16 of both for numbers; a NaN becomes 0x7fff, as the instruction has it.
__device__ __forceinline__ uint32_t RoundNumbersToBf16Pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// RoundToBf16 of both: pairs with a NaN take the long way.
__device__ __forceinline__ uint32_t RoundToBf16Pair(float low, float high) {
  if (low != low || high != high) {
    return static_cast<uint32_t>(RoundToBf16(low)) |
           (static_cast<uint32_t>(RoundToBf16(high)) << 16);
  }
  return RoundNumbersToBf16Pair(low, high);
}

}  // namespace moebius::kernels::cuda
