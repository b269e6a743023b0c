#pragma once

// Eight neighbouring BF16 elements of a row, what one thread of a row operation holds: one 16-byte
// access where rows are aligned, single elements (and zeros past the row's end) where they are not.

#include <cstdint>

#include "kernels/cuda/device/bf16.cuh"

namespace moebius::kernels::cuda {

inline constexpr int kVectorElements = 8;

struct RowVector {
  uint32_t pair[kVectorElements / 2] = {};

  __device__ __forceinline__ float At(int i) const {
    return i % 2 == 0 ? LowToFloat(pair[i / 2]) : HighToFloat(pair[i / 2]);
  }
};

// Whether vectors of rows of `dim` elements at this base and stride may be read in one access.
inline bool VectorsAreAligned(const void* base, int64_t stride, int64_t dim) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % kVectorElements == 0 &&
         dim % kVectorElements == 0;
}

// Elements [at, at + 8) of a row of `dim`; those past the end are +0.
template <bool kAligned>
__device__ __forceinline__ RowVector LoadVector(const uint16_t* row, int at, int dim) {
  RowVector v;
  if constexpr (kAligned) {
    if (at < dim) {
      const uint4 bits = *reinterpret_cast<const uint4*>(row + at);
      v.pair[0] = bits.x, v.pair[1] = bits.y, v.pair[2] = bits.z, v.pair[3] = bits.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
      if (at + i < dim) v.pair[i / 2] |= static_cast<uint32_t>(row[at + i]) << (16 * (i % 2));
    }
  }
  return v;
}

// LoadVector with a policy of L2 (kernels/cuda/device/barrier.cuh).
template <bool kAligned>
__device__ __forceinline__ RowVector LoadVector(const uint16_t* row, int at, int dim,
                                                uint64_t policy) {
  if constexpr (kAligned) {
    RowVector v;
    if (at < dim) {
      asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(v.pair[0]), "=r"(v.pair[1]), "=r"(v.pair[2]), "=r"(v.pair[3])
                   : "l"(row + at), "l"(policy));
    }
    return v;
  } else {
    return LoadVector<kAligned>(row, at, dim);
  }
}

template <bool kAligned>
__device__ __forceinline__ void StoreVector(const RowVector& v, uint16_t* row, int at, int dim) {
  if constexpr (kAligned) {
    if (at < dim) {
      *reinterpret_cast<uint4*>(row + at) = make_uint4(v.pair[0], v.pair[1], v.pair[2], v.pair[3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
      if (at + i < dim) row[at + i] = static_cast<uint16_t>(v.pair[i / 2] >> (16 * (i % 2)));
    }
  }
}

// The vector with +0 in the place of what lies past the row's end.
template <bool kAligned>
__device__ __forceinline__ RowVector WithoutTail(RowVector v, int at, int dim) {
#pragma unroll
  for (int i = 0; i < kVectorElements / 2; ++i) {
    if constexpr (kAligned) {
      if (at >= dim) v.pair[i] = 0;
    } else {
      if (at + 2 * i >= dim) v.pair[i] &= 0xffff0000u;
      if (at + 2 * i + 1 >= dim) v.pair[i] &= 0x0000ffffu;
    }
  }
  return v;
}

// Whether any of eight numbers is NaN.
__device__ __forceinline__ bool AnyNan(const float (&x)[kVectorElements]) {
  uint32_t any;
  asm("{\n.reg .pred p;\n"
      "setp.nan.f32 p, %1, %2;\n"
      "setp.nan.or.f32 p, %3, %4, p;\n"
      "setp.nan.or.f32 p, %5, %6, p;\n"
      "setp.nan.or.f32 p, %7, %8, p;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(any)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
  return any != 0;
}

// RoundToBf16 of each.
__device__ __forceinline__ RowVector RoundVector(const float (&x)[kVectorElements]) {
  RowVector v;
  if (AnyNan(x)) {
#pragma unroll
    for (int i = 0; i < kVectorElements / 2; ++i)
      v.pair[i] = RoundToBf16(x[2 * i]) | (static_cast<uint32_t>(RoundToBf16(x[2 * i + 1])) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < kVectorElements / 2; ++i)
      v.pair[i] = RoundNumbersToBf16Pair(x[2 * i], x[2 * i + 1]);
  }
  return v;
}

// Rounds function(0) .. function(7).
template <typename Function>
__device__ __forceinline__ RowVector RoundedVector(const Function& function) {
  float x[kVectorElements];
#pragma unroll
  for (int i = 0; i < kVectorElements; ++i) x[i] = function(i);
  return RoundVector(x);
}

// bf16(a + b), element by element.
__device__ __forceinline__ RowVector AddVectors(const RowVector& a, const RowVector& b) {
  return RoundedVector([&](int i) { return __fadd_rn(a.At(i), b.At(i)); });
}

}  // namespace moebius::kernels::cuda
