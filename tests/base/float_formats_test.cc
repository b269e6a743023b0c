// Goal: the conversions of base/float_formats.h are exact. Method: published vectors, and for
// rounding an exhaustive comparison with "nearest code, ties to the even code" computed in double.

#include "base/float_formats.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius {
namespace {

TEST(E4m3, DecodesThePublishedVectors) {
  EXPECT_EQ(ToFloat(E4m3{0x01}), 0.001953125f);
  EXPECT_EQ(ToFloat(E4m3{0x08}), 0.015625f);
  EXPECT_EQ(ToFloat(E4m3{0x30}), 0.5f);
  EXPECT_EQ(ToFloat(E4m3{0x38}), 1.0f);
  EXPECT_EQ(ToFloat(E4m3{0x39}), 1.125f);
  EXPECT_EQ(ToFloat(E4m3{0x40}), 2.0f);
  EXPECT_EQ(ToFloat(E4m3{0x7E}), 448.0f);
  EXPECT_EQ(ToFloat(E4m3{0xB8}), -1.0f);
  EXPECT_TRUE(std::isnan(ToFloat(E4m3{0x7F})));
  EXPECT_TRUE(std::isnan(ToFloat(E4m3{0xFF})));
  EXPECT_TRUE(std::signbit(ToFloat(E4m3{0x80})));
}

TEST(E4m3, EveryCodeSurvivesTheRoundTrip) {
  for (int code = 0; code < 256; ++code) {
    EXPECT_EQ(ToE4m3(ToFloat(E4m3{static_cast<uint8_t>(code)})).bits, code) << code;
  }
}

// The nearest finite code to x >= 0, ties to the even mantissa, by looking at all of them.
uint8_t NearestCode(float x) {
  int best = 0;
  for (int code = 1; code <= 0x7E; ++code) {
    const double error =
        std::fabs(static_cast<double>(ToFloat(E4m3{static_cast<uint8_t>(code)})) - x);
    const double best_error =
        std::fabs(static_cast<double>(ToFloat(E4m3{static_cast<uint8_t>(best)})) - x);
    if (error < best_error || (error == best_error && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best);
}

TEST(E4m3, RoundsToNearestEvenAndSaturates) {
  Prng prng(7);
  for (int i = 0; i < 20000; ++i) {
    const float x = std::ldexp(1.0f + prng.Unit(), static_cast<int>(prng.Below(24)) - 14);
    EXPECT_EQ(ToE4m3(x).bits, NearestCode(x)) << x;
    EXPECT_EQ(ToE4m3(-x).bits, NearestCode(x) | 0x80) << -x;
  }
  for (int code = 0; code < 0x7E; ++code) {  // exact ties
    const float tie = (ToFloat(E4m3{static_cast<uint8_t>(code)}) +
                       ToFloat(E4m3{static_cast<uint8_t>(code + 1)})) /
                      2;
    EXPECT_EQ(ToE4m3(tie).bits, NearestCode(tie)) << tie;
  }
  EXPECT_EQ(ToE4m3(1e30f).bits, 0x7E);
  EXPECT_EQ(ToE4m3(-std::numeric_limits<float>::infinity()).bits, 0xFE);
  EXPECT_EQ(ToE4m3(std::numeric_limits<float>::quiet_NaN()).bits & 0x7F, 0x7F);
}

TEST(Bf16, RoundsToNearestEven) {
  EXPECT_EQ(ToBf16(1.0f).bits, 0x3F80);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3F808000u)).bits, 0x3F80);  // tie, down to even
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3F818000u)).bits, 0x3F82);  // tie, up to even
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3F808001u)).bits, 0x3F81);
  EXPECT_EQ(ToBf16(std::numeric_limits<float>::max()).bits, 0x7F80);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x7F800001u)).bits, 0x7FC0);  // a NaN stays one
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0xFFFFFFFFu)).bits, 0xFFC0);
}

TEST(Bf16, EveryBitPatternSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = ToFloat(Bf16{static_cast<uint16_t>(bits)});
    if (std::isnan(value)) continue;
    EXPECT_EQ(ToBf16(value).bits, bits);
  }
}

}  // namespace
}  // namespace moebius
