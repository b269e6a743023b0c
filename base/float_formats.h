#pragma once

// Storage formats of weights and activations, as raw bits, and their exact conversions. Arithmetic
// is always done in float. Scalar and obvious; the fast versions live in kernels/cpu and are tested
// bit for bit against these. Pure functions, any thread.
//
// bf16: upper 16 bits of a float. e4m3: the OCP "fn" variant (1-4-3, bias 7, no infinity, NaN only
// 0x7F/0xFF, largest finite 448 = 0x7E, smallest subnormal 2^-9).

#include <bit>
#include <cstdint>

namespace moebius {

struct Bf16 {
  uint16_t bits = 0;
  friend bool operator==(Bf16,
                         Bf16) = default;  // compares bits: NaN equals itself, +0 differs from -0
};
static_assert(sizeof(Bf16) == 2);

struct E4m3 {
  uint8_t bits = 0;
  friend bool operator==(E4m3, E4m3) = default;
};
static_assert(sizeof(E4m3) == 1);

inline float ToFloat(Bf16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

// Round to nearest, ties to even. A NaN becomes the quiet NaN 0x7FC0 with the sign kept (one NaN
// per sign, so that hashes of poisoned rows are stable); overflow becomes infinity.
inline Bf16 ToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    return Bf16{static_cast<uint16_t>(((bits >> 16) & 0x8000u) | 0x7FC0u)};
  }
  const uint32_t rounding = 0x7FFFu + ((bits >> 16) & 1u);
  return Bf16{static_cast<uint16_t>((bits + rounding) >> 16)};
}

// Value of each of the 256 codes. 0x7F and 0xFF are NaN.
float ToFloat(E4m3 code);

// Round to nearest, ties to even, saturating at +-448 (infinities too); NaN becomes 0x7F with the
// sign kept.
E4m3 ToE4m3(float value);

// The smallest power of two that is not below `value`: what the format ue8m0 can hold. NaN stays
// NaN. REQUIRES: NaN, or a positive normal number of at most 2^127.
inline float RoundUpToPowerOfTwo(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (bits > 0x7F000000u) return value;
  return std::bit_cast<float>((bits + 0x007FFFFFu) & 0x7F800000u);
}

}  // namespace moebius
