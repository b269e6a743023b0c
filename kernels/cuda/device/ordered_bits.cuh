#pragma once

#include <cstdint>

namespace moebius::kernels::cuda {

// Unsigned integers in the order of the floats. NaN is placed with -infinity, -0 with +0; 0 is
// below all.
__device__ __forceinline__ uint32_t OrderedBits(float value) {
  if (value != value) value = -__builtin_inff();
  const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));  // -0 becomes +0
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float FromOrderedBits(uint32_t bits) {
  return __uint_as_float((bits & 0x80000000u) ? bits ^ 0x80000000u : ~bits);
}

}  // namespace moebius::kernels::cuda
