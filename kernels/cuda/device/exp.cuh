#pragma once

// exp in float32 as the CPU kernels define it (kernels/cpu/lanes16-inl.h, ExpLane): the same
// operations in the same order, so the same bits. 2^n * exp(r), n = round(x / ln 2), exp(r) by its
// Taylor polynomial of degree 7, 2^n in two exact factors. Largest error seen 0.87 units in the
// last place; exp(0) = 1, exp(-inf) = 0, NaN stays.

#include <cstdint>

namespace moebius::kernels::cuda {

__device__ __forceinline__ float ExactExp(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float c = x < -104.0f ? -104.0f : x;
  c = c > 89.0f ? 89.0f : c;
  const float shifted = __fmaf_rn(c, 1.44269504f, kMagic);
  const float n = __fsub_rn(shifted, kMagic);
  float r = __fmaf_rn(n, -0.693145751953125f, c);
  r = __fmaf_rn(n, -1.42860682e-06f, r);
  float y = 1.98412698e-04f;
  y = __fmaf_rn(y, r, 1.38888889e-03f);
  y = __fmaf_rn(y, r, 8.33333333e-03f);
  y = __fmaf_rn(y, r, 4.16666667e-02f);
  y = __fmaf_rn(y, r, 1.66666667e-01f);
  y = __fmaf_rn(y, r, 0.5f);
  y = __fmaf_rn(y, r, 1.0f);
  y = __fmaf_rn(y, r, 1.0f);
  const int32_t exponent = __float_as_int(shifted) - __float_as_int(kMagic);
  const int32_t half = exponent >> 1;
  const int32_t rest = exponent - half;
  y = __fmul_rn(y, __int_as_float((half + 127) << 23));
  return __fmul_rn(y, __int_as_float((rest + 127) << 23));
}

// gate * sigmoid(gate).
__device__ __forceinline__ float Silu(float gate) {
  return __fdiv_rn(gate, __fadd_rn(1.0f, ExactExp(-gate)));
}

}  // namespace moebius::kernels::cuda
