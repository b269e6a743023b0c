#include "base/float_formats.h"

#include <array>
#include <cmath>
#include <limits>

namespace moebius {
namespace {

std::array<float, 256> MakeE4m3Table() {
  std::array<float, 256> table{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 0xF;
    const int mantissa = code & 7;
    float magnitude;
    if (exponent == 15 && mantissa == 7) {
      magnitude = std::numeric_limits<float>::quiet_NaN();
    } else if (exponent == 0) {
      magnitude = std::ldexp(static_cast<float>(mantissa), -9);
    } else {
      magnitude = std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    }
    table[code] = (code & 0x80) ? -magnitude : magnitude;
  }
  return table;
}

}  // namespace

float ToFloat(E4m3 code) {
  static const std::array<float, 256> table = MakeE4m3Table();
  return table[code.bits];
}

E4m3 ToE4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return E4m3{static_cast<uint8_t>(sign | 0x7F)};
  if (magnitude == 0.0f) return E4m3{sign};
  if (magnitude >= 448.0f) return E4m3{static_cast<uint8_t>(sign | 0x7E)};
  // Scale so that one unit is the spacing of codes around `magnitude`; rint rounds ties to even.
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude = f * 2^exponent, f in [0.5, 1)
  const int spacing = exponent - 4 < -9 ? -9 : exponent - 4;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -spacing)));
  // For normal numbers units is 8..16 and the code is linear in it; subnormals have spacing -9.
  const int code = spacing == -9 ? units : ((spacing + 9) << 3) + units;
  return E4m3{static_cast<uint8_t>(sign | (code > 0x7E ? 0x7E : code))};
}

}  // namespace moebius
