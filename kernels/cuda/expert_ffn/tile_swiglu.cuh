#pragma once

// SwiGLU of a thread's accumulators. exp and division have branches for arguments that accumulators
// hardly ever have; with one branch for eight elements instead, the eight overlap.

#include <cstdint>

#include "kernels/cuda/device/exp.cuh"

namespace moebius::kernels::cuda {

// 0 .. kUsual where SiluOfUsual has the bits of Silu because no step of it overflows, underflows or
// is clamped: 2^-60 <= |gate| < 64. Zero, whose sign the corrections would lose, is not usual.
inline constexpr uint32_t kSmallest = 2 * 0x21800000u, kUsual = 2 * 0x42800000u - kSmallest - 1;
__device__ __forceinline__ uint32_t Unusual(float gate) {
  return 2 * __float_as_uint(gate) - kSmallest;
}

// ExactExp with one factor 2^n, and the division as the compiler makes it, without its test.
__device__ __forceinline__ float SiluOfUsual(float gate) {
  constexpr float kMagic = 12582912.0f;
  const float shifted = __fmaf_rn(-gate, 1.44269504f, kMagic);
  const float n = __fsub_rn(shifted, kMagic);
  float r = __fmaf_rn(n, -0.693145751953125f, -gate);
  r = __fmaf_rn(n, -1.42860682e-06f, r);
  float y = 1.98412698e-04f;
  y = __fmaf_rn(y, r, 1.38888889e-03f);
  y = __fmaf_rn(y, r, 8.33333333e-03f);
  y = __fmaf_rn(y, r, 4.16666667e-02f);
  y = __fmaf_rn(y, r, 1.66666667e-01f);
  y = __fmaf_rn(y, r, 0.5f);
  y = __fmaf_rn(y, r, 1.0f);
  y = __fmaf_rn(y, r, 1.0f);
  // kMagic has zeros in its low 22 bits, so n is what is left there.
  const float power = __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
  const float divisor = __fadd_rn(1.0f, power);
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
  inverse = __fmaf_rn(__fmaf_rn(-divisor, inverse, 1.0f), inverse, inverse);
  const float q = __fmul_rn(gate, inverse);
  return __fmaf_rn(__fmaf_rn(-divisor, q, gate), inverse, q);
}

// gate = silu(gate) * up.
template <int kCount>
__device__ __forceinline__ void SwiGluInPlace(float (&gate)[kCount], const float (&up)[kCount]) {
  constexpr int kBatch = kCount < 8 ? kCount : 8;
  static_assert(kCount % kBatch == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kBatch) {
    float silu[kBatch];
    uint32_t unusual = 0;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      unusual = max(unusual, Unusual(gate[i + k]));
      silu[k] = SiluOfUsual(gate[i + k]);
    }
    if (unusual > kUsual) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) silu[k] = Silu(gate[i + k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) gate[i + k] = __fmul_rn(silu[k], up[i + k]);
  }
}

}  // namespace moebius::kernels::cuda
