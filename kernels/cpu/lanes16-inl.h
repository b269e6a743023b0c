// (No #pragma once: Highway's foreach_target.h includes this file once per instruction set.)
//
// F32x16, the virtual vector of 16 float lanes that every CPU kernel is written in. AVX-512 holds
// it in one register, AVX2 in two, the portable baseline in an array; each operation below is
// defined lane by lane in IEEE float32, round to nearest, so all three give the same bits:
//
//   - Fma is fused everywhere (std::fma in the baseline). No other operation is ever contracted.
//   - A sum over K keeps 16 partial sums, lane l adding the elements k with k mod 16 = l in
//     ascending k; ReduceAdd then folds them in one fixed tree: lanes l and l + 8, then l and
//     l + 4, l and l + 2, l and l + 1. Ragged tails are filled with zeros, so the chain is the
//     same.
//   - Exp is our own polynomial (libm differs by version and CPU).
//
// NaN stays NaN, but its sign and payload are not specified.

#if defined(MOEBIUS_KERNELS_CPU_LANES16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEBIUS_KERNELS_CPU_LANES16_INL_H_
#undef MOEBIUS_KERNELS_CPU_LANES16_INL_H_
#else
#define MOEBIUS_KERNELS_CPU_LANES16_INL_H_
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/float_formats.h"
#include "base/tensor_view.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace moebius::kernels::cpu {
namespace HWY_NAMESPACE {

inline constexpr int64_t kLanes = 16;

// e4m3 weights are decoded to value / 256 (DecodeDiv256); the factor goes into their block's scale.
inline constexpr float kDecodedE4m3Scale = 256.0f;

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;
using IntTag = hn::Rebind<int32_t, FloatTag>;
using UintTag = hn::Rebind<uint32_t, FloatTag>;
using HalfwordTag = hn::Rebind<uint16_t, FloatTag>;
using ByteTag = hn::Rebind<uint8_t, FloatTag>;
inline constexpr int kPartLanes = HWY_MAX_BYTES / 4;
inline constexpr int kParts = kLanes / kPartLanes;
static_assert(kParts == 1 || kParts == 2);

struct F32x16 {
  FloatVec part[kParts];
};

// Applies a function of native vectors to each part.
template <class Function>
HWY_INLINE F32x16 ForParts(const Function& function) {
  if constexpr (kParts == 1) {
    return F32x16{{function(0)}};
  } else {
    return F32x16{{function(0), function(1)}};
  }
}

HWY_INLINE F32x16 Set(float value) {
  return ForParts([&](int) HWY_ATTR { return hn::Set(FloatTag(), value); });
}
HWY_INLINE F32x16 Zero() {
  return ForParts([&](int) HWY_ATTR { return hn::Zero(FloatTag()); });
}
HWY_INLINE F32x16 Load(const float* from) {
  return ForParts([&](int p) HWY_ATTR { return hn::LoadU(FloatTag(), from + p * kPartLanes); });
}
HWY_INLINE void Store(const F32x16& v, float* to) {
  for (int p = 0; p < kParts; ++p) hn::StoreU(v.part[p], FloatTag(), to + p * kPartLanes);
}
HWY_INLINE F32x16 Fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return ForParts([&](int p) HWY_ATTR { return hn::MulAdd(a.part[p], b.part[p], c.part[p]); });
}
HWY_INLINE F32x16 Add(const F32x16& a, const F32x16& b) {
  return ForParts([&](int p) HWY_ATTR { return hn::Add(a.part[p], b.part[p]); });
}
HWY_INLINE F32x16 Sub(const F32x16& a, const F32x16& b) {
  return ForParts([&](int p) HWY_ATTR { return hn::Sub(a.part[p], b.part[p]); });
}
HWY_INLINE F32x16 Mul(const F32x16& a, const F32x16& b) {
  return ForParts([&](int p) HWY_ATTR { return hn::Mul(a.part[p], b.part[p]); });
}
HWY_INLINE F32x16 Div(const F32x16& a, const F32x16& b) {
  return ForParts([&](int p) HWY_ATTR { return hn::Div(a.part[p], b.part[p]); });
}
// a > b ? a : b in each lane.
HWY_INLINE F32x16 Max(const F32x16& a, const F32x16& b) {
  return ForParts([&](int p) HWY_ATTR {
    return hn::IfThenElse(hn::Gt(a.part[p], b.part[p]), a.part[p], b.part[p]);
  });
}

HWY_INLINE FloatVec LoadBf16Part(const Bf16* from) {
  const auto bits = hn::LoadU(HalfwordTag(), reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(hn::PromoteTo(UintTag(), bits)));
}
HWY_INLINE F32x16 LoadBf16(const Bf16* from) {
  return ForParts([&](int p) HWY_ATTR { return LoadBf16Part(from + p * kPartLanes); });
}

// Rounds each lane to a BF16 value as ToBf16 does (nearest even, one quiet NaN per sign).
HWY_INLINE F32x16 RoundBf16(const F32x16& v) {
  return ForParts([&](int p) HWY_ATTR {
    const UintTag u;
    const auto bits = hn::BitCast(u, v.part[p]);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 1u));
    const auto rounded =
        hn::And(hn::Add(bits, hn::Add(odd, hn::Set(u, 0x7FFFu))), hn::Set(u, 0xFFFF0000u));
    const auto nan = hn::Or(hn::And(bits, hn::Set(u, 0x80000000u)), hn::Set(u, 0x7FC00000u));
    const auto is_nan = hn::IsNaN(v.part[p]);
    return hn::IfThenElse(is_nan, hn::BitCast(FloatTag(), nan), hn::BitCast(FloatTag(), rounded));
  });
}
// REQUIRES: every lane is a BF16 value (RoundBf16).
HWY_INLINE void StoreRoundedBf16(const F32x16& v, Bf16* to) {
  for (int p = 0; p < kParts; ++p) {
    const auto high = hn::ShiftRight<16>(hn::BitCast(UintTag(), v.part[p]));
    hn::StoreU(hn::TruncateTo(HalfwordTag(), high), HalfwordTag(),
               reinterpret_cast<uint16_t*>(to + p * kPartLanes));
  }
}

// Sixteen e4m3 codes as value / 256, exactly, NaN codes excepted (they read as +-480 / 256: see
// HasNanCode). An e4m3 code moved into the fields of an IEEE half is its value times 2^-8,
// subnormals included, and halves convert exactly. One conversion serves both: no table, no branch,
// no float32 subnormal (slow on some CPUs) on the way.
HWY_INLINE F32x16 DecodeDiv256(const E4m3* from) {
  return ForParts([&](int p) HWY_ATTR {
    const hn::Rebind<int16_t, FloatTag> i16;
    const hn::Rebind<int8_t, FloatTag> i8;
    const auto codes = hn::LoadU(i8, reinterpret_cast<const int8_t*>(from) + p * kPartLanes);
    // The sign in bits 15 to 7, then moved up so that it fills 15 and 14; 14 is cleared.
    const auto high = hn::ShiftLeft<7>(hn::PromoteTo(i16, codes));
    const auto half = hn::And(high, hn::Set(i16, static_cast<int16_t>(0xBFFF)));
    return hn::PromoteTo(FloatTag(), hn::BitCast(hn::Rebind<hwy::float16_t, FloatTag>(), half));
  });
}

// The largest magnitude (low 7 bits) among e4m3 codes, to find NaN (0x7F, 0xFF) in many at once.
class CodeScan {
 public:
  HWY_INLINE CodeScan() : largest_(hn::Zero(Wide())), magnitude_(hn::Set(Wide(), uint8_t{0x7F})) {}
  // REQUIRES: count is a multiple of the register's size in bytes (kStep).
  HWY_INLINE void Add(const E4m3* codes, int64_t count) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(codes);
    for (int64_t k = 0; k < count; k += kStep) {
      largest_ = hn::Max(largest_, hn::And(hn::LoadU(Wide(), from + k), magnitude_));
    }
  }
  HWY_INLINE bool HasNan() const { return !hn::AllFalse(Wide(), hn::Eq(largest_, magnitude_)); }

 private:
  using Wide = hn::ScalableTag<uint8_t>;
  static constexpr int64_t kStep = HWY_MAX_BYTES;
  hn::Vec<Wide> largest_;
  const hn::Vec<Wide> magnitude_;
};

// Whether any of 16 codes is NaN.
HWY_INLINE bool HasNanCode16(const E4m3* codes) {
  const hn::CappedTag<uint8_t, 16> d;
  const auto magnitude = hn::Set(d, uint8_t{0x7F});
  const auto v = hn::LoadU(d, reinterpret_cast<const uint8_t*>(codes));
  return !hn::AllFalse(d, hn::Eq(hn::And(v, magnitude), magnitude));
}

// Saturating e4m3 codes of 16 floats, nearest even, as ToE4m3.
HWY_INLINE void StoreE4m3(const F32x16& v, E4m3* to) {
  for (int p = 0; p < kParts; ++p) {
    const FloatTag f;
    const UintTag u;
    const auto bits = hn::BitCast(u, v.part[p]);
    const auto sign = hn::ShiftRight<24>(hn::And(bits, hn::Set(u, 0x80000000u)));
    const auto mag_bits = hn::And(bits, hn::Set(u, 0x7FFFFFFFu));
    const auto mag = hn::BitCast(f, mag_bits);
    // Normal range: round the mantissa to 3 bits, move the exponent's bias from 127 to 7.
    const auto odd = hn::And(hn::ShiftRight<20>(mag_bits), hn::Set(u, 1u));
    const auto normal =
        hn::Sub(hn::ShiftRight<20>(hn::Add(mag_bits, hn::Add(odd, hn::Set(u, 0x7FFFFu)))),
                hn::Set(u, 120u << 3));
    // Subnormal range: adding 2^14 leaves round(value * 2^9) in the low mantissa bits.
    const auto subnormal = hn::Sub(hn::BitCast(u, hn::Add(mag, hn::Set(f, 16384.0f))),
                                   hn::BitCast(u, hn::Set(f, 16384.0f)));
    const auto is_small = hn::RebindMask(u, hn::Lt(mag, hn::Set(f, 0.015625f)));
    const auto is_large = hn::RebindMask(u, hn::Ge(mag, hn::Set(f, 448.0f)));
    auto code = hn::IfThenElse(is_small, subnormal, normal);
    code = hn::IfThenElse(is_large, hn::Set(u, 0x7Eu), code);
    code = hn::IfThenElse(hn::RebindMask(u, hn::IsNaN(v.part[p])), hn::Set(u, 0x7Fu), code);
    hn::StoreU(hn::TruncateTo(ByteTag(), hn::Or(code, sign)), ByteTag(),
               reinterpret_cast<uint8_t*>(to) + p * kPartLanes);
  }
}

// The fixed tree over the 16 lanes.
HWY_INLINE float ReduceAdd(const F32x16& v) {
  const hn::FixedTag<float, 8> d8;
  const hn::FixedTag<float, 4> d4;
#if HWY_TARGET == HWY_AVX3
  const auto v8 = hn::Add(hn::LowerHalf(d8, v.part[0]), hn::UpperHalf(d8, v.part[0]));
#else
  const auto v8 = hn::Add(v.part[0], v.part[1]);
  (void)d8;
#endif
  const auto v4 = hn::Add(hn::LowerHalf(d4, v8), hn::UpperHalf(d4, v8));
  const auto v2 = hn::Add(v4, hn::Shuffle1032(v4));
  return hn::GetLane(hn::Add(v2, hn::Shuffle2301(v2)));
}

// exp(x), see ExpLane below for the algorithm: the same operations in the same order.
HWY_INLINE F32x16 Exp(const F32x16& x) {
  return ForParts([&](int p) HWY_ATTR {
    const FloatTag f;
    const IntTag i;
    const auto magic = hn::Set(f, 12582912.0f);
    auto c = x.part[p];
    c = hn::IfThenElse(hn::Lt(c, hn::Set(f, -104.0f)), hn::Set(f, -104.0f), c);
    c = hn::IfThenElse(hn::Gt(c, hn::Set(f, 89.0f)), hn::Set(f, 89.0f), c);
    const auto shifted = hn::MulAdd(c, hn::Set(f, 1.44269504f), magic);
    const auto n = hn::Sub(shifted, magic);
    auto r = hn::MulAdd(n, hn::Set(f, -0.693145751953125f), c);
    r = hn::MulAdd(n, hn::Set(f, -1.42860682e-06f), r);
    auto y = hn::Set(f, 1.98412698e-04f);
    y = hn::MulAdd(y, r, hn::Set(f, 1.38888889e-03f));
    y = hn::MulAdd(y, r, hn::Set(f, 8.33333333e-03f));
    y = hn::MulAdd(y, r, hn::Set(f, 4.16666667e-02f));
    y = hn::MulAdd(y, r, hn::Set(f, 1.66666667e-01f));
    y = hn::MulAdd(y, r, hn::Set(f, 0.5f));
    y = hn::MulAdd(y, r, hn::Set(f, 1.0f));
    y = hn::MulAdd(y, r, hn::Set(f, 1.0f));
    const auto exponent = hn::Sub(hn::BitCast(i, shifted), hn::BitCast(i, magic));
    const auto half = hn::ShiftRight<1>(exponent);
    const auto rest = hn::Sub(exponent, half);
    const auto bias = hn::Set(i, 127);
    y = hn::Mul(y, hn::BitCast(f, hn::ShiftLeft<23>(hn::Add(half, bias))));
    return hn::Mul(y, hn::BitCast(f, hn::ShiftLeft<23>(hn::Add(rest, bias))));
  });
}

#else  // the portable baseline: the same definitions in plain C++

struct F32x16 {
  float lane[kLanes];
};

template <class Function>
inline F32x16 ForLanes(const Function& function) {
  F32x16 out;
  for (int l = 0; l < kLanes; ++l) out.lane[l] = function(l);
  return out;
}

inline F32x16 Set(float value) {
  return ForLanes([&](int) { return value; });
}
inline F32x16 Zero() { return Set(0.0f); }
inline F32x16 Load(const float* from) {
  return ForLanes([&](int l) { return from[l]; });
}
inline void Store(const F32x16& v, float* to) { std::memcpy(to, v.lane, sizeof(v.lane)); }
inline F32x16 Fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return ForLanes([&](int l) { return std::fma(a.lane[l], b.lane[l], c.lane[l]); });
}
inline F32x16 Add(const F32x16& a, const F32x16& b) {
  return ForLanes([&](int l) { return a.lane[l] + b.lane[l]; });
}
inline F32x16 Sub(const F32x16& a, const F32x16& b) {
  return ForLanes([&](int l) { return a.lane[l] - b.lane[l]; });
}
inline F32x16 Mul(const F32x16& a, const F32x16& b) {
  return ForLanes([&](int l) { return a.lane[l] * b.lane[l]; });
}
inline F32x16 Div(const F32x16& a, const F32x16& b) {
  return ForLanes([&](int l) { return a.lane[l] / b.lane[l]; });
}
inline F32x16 Max(const F32x16& a, const F32x16& b) {
  return ForLanes([&](int l) { return a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]; });
}
inline F32x16 LoadBf16(const Bf16* from) {
  return ForLanes([&](int l) { return ToFloat(from[l]); });
}
inline F32x16 RoundBf16(const F32x16& v) {
  return ForLanes([&](int l) { return ToFloat(ToBf16(v.lane[l])); });
}
inline void StoreRoundedBf16(const F32x16& v, Bf16* to) {
  for (int l = 0; l < kLanes; ++l) to[l] = ToBf16(v.lane[l]);
}
inline F32x16 DecodeDiv256(const E4m3* from) {
  return ForLanes([&](int l) {
    const E4m3 code = from[l];
    if ((code.bits & 0x7F) == 0x7F) return (code.bits & 0x80) ? -480.0f / 256 : 480.0f / 256;
    return ToFloat(code) / 256.0f;
  });
}
class CodeScan {
 public:
  void Add(const E4m3* codes, int64_t count) {
    for (int64_t k = 0; k < count; ++k) has_nan_ = has_nan_ || (codes[k].bits & 0x7F) == 0x7F;
  }
  bool HasNan() const { return has_nan_; }

 private:
  bool has_nan_ = false;
};
inline bool HasNanCode16(const E4m3* codes) {
  CodeScan scan;
  scan.Add(codes, kLanes);
  return scan.HasNan();
}
inline void StoreE4m3(const F32x16& v, E4m3* to) {
  for (int l = 0; l < kLanes; ++l) to[l] = ToE4m3(v.lane[l]);
}
inline float ReduceAdd(const F32x16& v) {
  float lane[kLanes];
  std::memcpy(lane, v.lane, sizeof(lane));
  for (int width = 8; width >= 1; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

// exp(x) = 2^n * exp(r), n = round(x / ln 2), r = x - n ln 2 with ln 2 in two parts, exp(r) by its
// Taylor polynomial of degree 7 in Horner form, 2^n in two exact factors so that subnormal results
// are rounded once. Largest error seen 0.87 units in the last place (number_formats_test);
// exp(0) = 1, exp(-inf) = 0, exp(inf) = inf, NaN stays.
inline float ExpLane(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float c = x < -104.0f ? -104.0f : x;
  c = c > 89.0f ? 89.0f : c;
  const float shifted = std::fma(c, 1.44269504f, kMagic);
  const float n = shifted - kMagic;
  float r = std::fma(n, -0.693145751953125f, c);
  r = std::fma(n, -1.42860682e-06f, r);
  float y = 1.98412698e-04f;
  y = std::fma(y, r, 1.38888889e-03f);
  y = std::fma(y, r, 8.33333333e-03f);
  y = std::fma(y, r, 4.16666667e-02f);
  y = std::fma(y, r, 1.66666667e-01f);
  y = std::fma(y, r, 0.5f);
  y = std::fma(y, r, 1.0f);
  y = std::fma(y, r, 1.0f);
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kMagic);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  const uint32_t rest = exponent - half;
  y = y * std::bit_cast<float>((half + 127u) << 23);
  return y * std::bit_cast<float>((rest + 127u) << 23);
}
inline F32x16 Exp(const F32x16& x) {
  return ForLanes([&](int l) { return ExpLane(x.lane[l]); });
}

#endif

// The rest is written in the operations above.

HWY_INLINE void StoreBf16(const F32x16& v, Bf16* to) { StoreRoundedBf16(RoundBf16(v), to); }

// Tails: the first `count` < 16 lanes; the others read as zero and are not written.
HWY_INLINE F32x16 LoadTail(const float* from, int64_t count) {
  alignas(64) float lanes[kLanes] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(float));
  return Load(lanes);
}
HWY_INLINE F32x16 LoadBf16Tail(const Bf16* from, int64_t count) {
  alignas(32) Bf16 lanes[kLanes] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(Bf16));
  return LoadBf16(lanes);
}
HWY_INLINE F32x16 DecodeDiv256Tail(const E4m3* from, int64_t count) {
  alignas(16) E4m3 lanes[kLanes] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count));
  return DecodeDiv256(lanes);
}
HWY_INLINE void StoreTail(const F32x16& v, float* to, int64_t count) {
  alignas(64) float lanes[kLanes];
  Store(v, lanes);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(float));
}
HWY_INLINE void StoreBf16Tail(const F32x16& v, Bf16* to, int64_t count) {
  alignas(32) Bf16 lanes[kLanes];
  StoreBf16(v, lanes);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(Bf16));
}
HWY_INLINE void StoreE4m3Tail(const F32x16& v, E4m3* to, int64_t count) {
  alignas(16) E4m3 lanes[kLanes];
  StoreE4m3(v, lanes);
  std::memcpy(to, lanes, static_cast<size_t>(count));
}

// Whether any of `count` codes is NaN. Kernels that decode with DecodeDiv256 ask this (or a
// CodeScan) once per block of weights and make the affected outputs NaN.
HWY_INLINE bool HasNanCode(const E4m3* codes, int64_t count) {
  int64_t k = count - count % kQuantBlock;
  CodeScan scan;
  scan.Add(codes, k);
  bool found = scan.HasNan();
  for (; k + kLanes <= count; k += kLanes) found = found || HasNanCode16(codes + k);
  for (; k < count; ++k) found = found || (codes[k].bits & 0x7F) == 0x7F;
  return found;
}

// Calls step(k, 16) over [0, count) and step(k, tail) for a ragged end.
template <class Step>
HWY_INLINE void ForLaneSteps(int64_t count, const Step& step) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) step(k, kLanes);
  if (k < count) step(k, count - k);
}

}  // namespace HWY_NAMESPACE
}  // namespace moebius::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // toggle
