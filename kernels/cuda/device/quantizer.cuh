#pragma once

// The 1x128 activation quantiser of kernels/moe.h (QuantizeRowsParams) on rows in registers: 16
// consecutive lanes hold a block, 8 elements each. Codes and scales are those of
// kernels/reference, bit by bit, NaN blocks too.

#include <cstdint>

#include "kernels/cuda/device/row_vector.cuh"

namespace moebius::kernels::cuda {

inline constexpr int kBlockLanes = 16;

struct BlockScale {
  float scale;       // NaN if the block holds a NaN or an infinity
  float reciprocal;  // 1 / scale, rounded to nearest
};

// Bits of the largest |x| of the block. |x| orders as its bits do; infinities and NaN are above all
// finite numbers. All 32 lanes of the warp take part.
__device__ __forceinline__ uint32_t LargestOfBlock(const RowVector& x) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVectorElements / 2; ++i)
    largest = __vmaxu2(largest, x.pair[i] & 0x7fff7fffu);
#pragma unroll
  for (int offset = kBlockLanes / 2; offset > 0; offset /= 2)
    largest = __vmaxu2(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  return max(largest & 0xffffu, largest >> 16);
}

__device__ __forceinline__ BlockScale ScaleOfBlock(uint32_t largest, bool power_of_two) {
  if (largest >= 0x7f80u) {
    const float nan = __uint_as_float(0x7fc00000u);
    return {nan, nan};
  }
  float scale = __fdiv_rn(fmaxf(__uint_as_float(largest << 16), 1e-4f), 448.0f);
  if (power_of_two) {
    // RoundUpToPowerOfTwo of base/float_formats.h; scales are normal and far below 2^127.
    scale = __uint_as_float((__float_as_uint(scale) + 0x007fffffu) & 0x7f800000u);
  }
  return {scale, __frcp_rn(scale)};
}

// x / scale, rounded to nearest, for |x| <= 448 * scale: the quotient by the reciprocal, corrected
// twice by its exact remainder (the first correction brings it within one unit in the last place,
// the second makes it the nearest: Markstein, IBM J. Res. Dev. 34, 1990). Where a remainder
// underflows the quotient is below 2^-11, whose code is zero anyway. The sign is put back because
// -0 would lose it.
__device__ __forceinline__ float DivideByScale(float x, const BlockScale& s) {
  float q = __fmul_rn(x, s.reciprocal);
  q = __fmaf_rn(__fmaf_rn(-q, s.scale, x), s.reciprocal, q);
  q = __fmaf_rn(__fmaf_rn(-q, s.scale, x), s.reciprocal, q);
  return copysignf(q, x);
}

// Nearest even, saturating. REQUIRES: neither is NaN.
__device__ __forceinline__ uint32_t ToE4m3Pair(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// The codes of a vector whose block has scale `s`, first element in the lowest byte.
__device__ __forceinline__ uint2 CodesOfVector(const RowVector& x, const BlockScale& s) {
  uint32_t half[2] = {0, 0};
  if (isnan(s.scale)) {
    // Quotients by NaN are the NaN of the scale, unless x is a NaN itself: then they are x.
    for (int i = 0; i < kVectorElements; ++i) {
      const uint32_t bits = (x.pair[i / 2] >> (16 * (i % 2))) & 0xffffu;
      half[i / 4] |= (bits > 0xff80u ? 0xffu : 0x7fu) << (8 * (i % 4));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVectorElements / 2; ++i) {
      half[i / 2] |= ToE4m3Pair(DivideByScale(x.At(2 * i), s), DivideByScale(x.At(2 * i + 1), s))
                     << (16 * (i % 2));
    }
  }
  return make_uint2(half[0], half[1]);
}

// |x| as bits from here on is an infinity or a NaN.
inline constexpr uint32_t kNotFinite = 0x7f80u;

// ScaleOfBlock and CodesOfVector of blocks below kNotFinite, without a branch: the divisions as the
// compiler makes them, without its test for operands that no finite block leads to.
__device__ __forceinline__ BlockScale ScaleOfFinite(uint32_t largest, bool power_of_two) {
  constexpr float kReciprocal = 1.0f / 448.0f;
  const float x = fmaxf(__uint_as_float(largest << 16), 1e-4f);
  float scale = __fmul_rn(x, kReciprocal);
  scale = __fmaf_rn(__fmaf_rn(-scale, 448.0f, x), kReciprocal, scale);
  if (power_of_two) scale = __uint_as_float((__float_as_uint(scale) + 0x007fffffu) & 0x7f800000u);
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
  return {scale, __fmaf_rn(__fmaf_rn(-scale, reciprocal, 1.0f), reciprocal, reciprocal)};
}
__device__ __forceinline__ uint2 CodesOfFinite(const RowVector& x, const BlockScale& s) {
  uint32_t pair[kVectorElements / 2];
#pragma unroll
  for (int i = 0; i < kVectorElements / 2; ++i)
    pair[i] = ToE4m3Pair(DivideByScale(x.At(2 * i), s), DivideByScale(x.At(2 * i + 1), s));
  return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

// Stores codes [at, at + 8) of a row of `dim`. kAligned: 8-byte accesses.
template <bool kAligned>
__device__ __forceinline__ void StoreCodes(uint2 codes, uint8_t* row, int at, int dim) {
  if constexpr (kAligned) {
    if (at < dim) *reinterpret_cast<uint2*>(row + at) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
      if (at + i < dim)
        row[at + i] = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
    }
  }
}

// Whether codes of rows of `dim` at this base and stride may be written in one access.
inline bool CodesAreAligned(const void* base, int64_t stride, int64_t dim) {
  return reinterpret_cast<uintptr_t>(base) % 8 == 0 && stride % kVectorElements == 0 &&
         dim % kVectorElements == 0;
}

// Quantises a row's vector at element `at` and stores codes and, by the block's first lane, its
// scale. All 32 lanes of the warp take part, those past the row's end with zeros.
template <bool kAligned>
__device__ __forceinline__ void QuantizeVector(const RowVector& x, int at, int dim,
                                               bool power_of_two, uint8_t* codes, float* scales) {
  const BlockScale s = ScaleOfBlock(LargestOfBlock(x), power_of_two);
  StoreCodes<kAligned>(CodesOfVector(x, s), codes, at, dim);
  if (at % (kBlockLanes * kVectorElements) == 0 && at < dim)
    scales[at / (kBlockLanes * kVectorElements)] = s.scale;
}

}  // namespace moebius::kernels::cuda
