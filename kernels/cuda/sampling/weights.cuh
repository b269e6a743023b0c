#pragma once

// The arithmetic of a draw: weights as integers, the order of candidates as integers, the
// logarithm.

#include <cstdint>

#include "base/ids.h"
#include "kernels/cuda/device/ordered_bits.cuh"

namespace moebius::kernels::cuda {

// log2(e^(logit - max)) of a negligible weight: 2^-60 rounds to mass 0.
constexpr float kLeastExponent = -60.0f;
constexpr int kMassBits = 41;  // a weight of 1 has mass 2^41
constexpr float kLog2E = 1.44269504f;

// The exponent of a weight, at most 0. NaN (a NaN logit, or a maximum that is infinite) is
// negligible.
__device__ __forceinline__ float WeightExponent(float logit, float maximum, float factor) {
  return fmaxf(__fmul_rn(__fsub_rn(logit, maximum), factor), kLeastExponent);
}

// A mass in two parts, a multiple of 2^-19 and what is left in multiples of 2^-41 (-2^21 .. 2^21),
// each as the representation of a float in whose low bits the multiple stands: adding 2^k (1.5 *
// 2^k where it may be negative) rounds a float to a multiple of 2^(k - 23) and leaves the multiple
// there. Three additions, for the sum of both is a float, too.
constexpr float kHighMagic = 16.0f, kLowMagic = 1.5f / 262144;
constexpr float kBothMagic = kHighMagic + kLowMagic;
static_assert(kBothMagic - kHighMagic == kLowMagic);
struct MassParts {
  uint32_t high;
  uint32_t low;
  float less_high;  // kLowMagic less the multiple of 2^-19
};
__device__ __forceinline__ MassParts PartsOf(float exponent) {
  float weight;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(weight) : "f"(exponent));
  const float high = __fadd_rn(weight, kHighMagic);
  const float less_high = __fsub_rn(kBothMagic, high);
  return {__float_as_uint(high), __float_as_uint(__fadd_rn(weight, less_high)), less_high};
}

// The sum of up to 1,000 masses.
struct MassSum {
  uint32_t high = 0, low = 0;  // modulo 2^32
  __device__ __forceinline__ void Add(MassParts parts) {
    high += parts.high;
    low += parts.low;
  }
  __device__ __forceinline__ int64_t TotalOf(uint32_t count) const {
    return (static_cast<int64_t>(high - count * __float_as_uint(kHighMagic)) << 22) +
           static_cast<int32_t>(low - count * __float_as_uint(kLowMagic));
  }
};

// The sum and the number of up to 1,000 masses that are added where a condition holds. All but one
// of the additions are of floats, for which there is a pipe of their own, and exact: Flush is
// called before there are more than 32, and multiples of 2^-19 up to 32 are floats.
struct CountedMassSum {
  float count = 0.0f;
  float less_high = 0.0f;                     // of those since Flush
  int32_t units = 0;                          // the others', in multiples of 2^-19
  uint32_t low = 0;                           // modulo 2^32
  static constexpr float kUnits = 524288.0f;  // 2^19
  __device__ __forceinline__ void Flush() {
    units += static_cast<int32_t>(__fmul_rn(less_high, kUnits));
    less_high = 0.0f;
  }
  __device__ __forceinline__ uint32_t Count() const { return static_cast<uint32_t>(count); }
  // After Flush.
  __device__ __forceinline__ int64_t Total() const {
    const int64_t high = static_cast<int64_t>(Count()) * static_cast<int64_t>(kLowMagic * kUnits);
    return ((high - units) << 22) +
           static_cast<int32_t>(low - Count() * __float_as_uint(kLowMagic));
  }
};

__device__ __forceinline__ uint64_t MassOf(float exponent) {
  MassSum sum;
  sum.Add(PartsOf(exponent));
  return static_cast<uint64_t>(sum.TotalOf(1));
}

// Ascending keys are candidates in descending logit, then ascending id.
constexpr int kIdBits = 20;
__device__ __forceinline__ uint64_t CandidateKey(float logit, TokenId id) {
  return (static_cast<uint64_t>(~OrderedBits(logit)) << kIdBits) | static_cast<uint32_t>(id);
}
__device__ __forceinline__ TokenId IdOfKey(uint64_t key) {
  return static_cast<TokenId>(key & ((1u << kIdBits) - 1));
}
__device__ __forceinline__ float LogitOfKey(uint64_t key) {
  return FromOrderedBits(~static_cast<uint32_t>(key >> kIdBits));
}

// Natural logarithm of a normal, positive double: kernels/cpu/sampler.h's, the same operations.
__device__ inline double NaturalLog(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
  int64_t n = static_cast<int64_t>((bits >> 52) & 0x7FF) - 1023;
  double m = __longlong_as_double(
      static_cast<int64_t>((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull));
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++n;
  }
  const double t = (m - 1.0) / (m + 1.0);
  const double t2 = t * t;
  double series = 0.0;
#pragma unroll
  for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * t2;
  return static_cast<double>(n) * 0.6931471805599453 + 2.0 * (t + t * series);
}

// log(sum of masses) at temperature 1, NaN for an empty sum.
__device__ inline float LogOfMass(uint64_t mass) {
  if (mass == 0) return __int_as_float(0x7fffffff);
  return static_cast<float>(
      NaturalLog(static_cast<double>(mass) * (1.0 / static_cast<double>(1ull << kMassBits))));
}

}  // namespace moebius::kernels::cuda
