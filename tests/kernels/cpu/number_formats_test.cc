// The kernels' own conversions and exp, on every instruction set, against base/float_formats.h and
// libm in double.

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "gtest/gtest.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/sampler.h"
#include "tests/kernels/cpu/random_tensors.h"

namespace moebius::kernels::cpu {
namespace {

class NumberFormats : public testing::TestWithParam<CpuTarget> {
 protected:
  const KernelTable& kernels_ = KernelsFor(GetParam());
};

std::string TargetName(const testing::TestParamInfo<CpuTarget>& target) {
  return Name(target.param);
}

INSTANTIATE_TEST_SUITE_P(Targets, NumberFormats, testing::ValuesIn(SupportedTargets()), TargetName);

TEST_P(NumberFormats, EveryE4m3WeightDecodesExactly) {
  // 256 outputs, one code each at column `at`; x is 1 there and 0 elsewhere.
  for (const int64_t k : {1, 16, 37, 128}) {
    std::vector<E4m3> codes(256 * k);
    std::vector<Bf16> x(k);
    const int64_t at = k - 1;
    x[at] = ToBf16(1.0f);
    for (int n = 0; n < 256; ++n) codes[n * k + at] = E4m3{static_cast<uint8_t>(n)};
    const std::vector<float> scales = {1.0f, 1.0f};
    std::vector<float> out(256);
    const Bf16* row = x.data();
    LinearArgs args;
    args.weight = {DType::kE4m3, 256, k, reinterpret_cast<const std::byte*>(codes.data()),
                   scales.data()};
    args.x = &row;
    args.out_f32 = out.data();
    args.out_stride = 256;
    for (const bool rounded : {false, true}) {
      args.round_weights = rounded;
      kernels_.linear(args, 0, 1, 0, 256);
      for (int n = 0; n < 256; ++n) {
        const float value = ToFloat(E4m3{static_cast<uint8_t>(n)});
        if (std::isnan(value)) {
          EXPECT_TRUE(std::isnan(out[n])) << n;
        } else {
          EXPECT_EQ(out[n], value) << n << " of " << k;
        }
      }
    }
  }
}

TEST_P(NumberFormats, EveryE4m3CodeDecodesToItsBf16) {
  std::vector<E4m3> codes;
  for (int n = 0; n < 256; ++n) codes.push_back(E4m3{static_cast<uint8_t>(n)});
  std::vector<Bf16> out(256);
  kernels_.decode_row(codes.data(), 256, out.data());
  for (int n = 0; n < 256; ++n) {
    const float value = ToFloat(codes[n]);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(ToFloat(out[n]))) << n;
    } else {
      EXPECT_EQ(ToFloat(out[n]), value) << n;
      EXPECT_EQ(out[n].bits & 0x8000, (codes[n].bits & 0x80) << 8) << n;
    }
  }
}

TEST_P(NumberFormats, EveryBf16QuantizesAsTheReferenceConversion) {
  // 448 in each block makes its scale exactly 1.
  std::vector<Bf16> values;
  for (uint32_t magnitude = 0; magnitude <= ToBf16(448.0f).bits; ++magnitude) {
    for (const uint32_t sign : {0u, 0x8000u}) {
      if (values.size() % kQuantBlock == 0) values.push_back(ToBf16(448.0f));
      values.push_back(Bf16{static_cast<uint16_t>(magnitude | sign)});
    }
  }
  const int64_t dim = static_cast<int64_t>(values.size());
  std::vector<E4m3> codes(values.size());
  std::vector<float> scales(CeilDiv(dim, kQuantBlock));
  kernels_.quantize_row(values.data(), dim, false, codes.data(), scales.data());
  int64_t wrong = 0;
  for (int64_t i = 0; i < dim; ++i) {
    EXPECT_EQ(scales[i / kQuantBlock], 1.0f);
    wrong += codes[i] != ToE4m3(ToFloat(values[i]));
  }
  EXPECT_EQ(wrong, 0);
}

TEST_P(NumberFormats, RoundsToBf16AsTheReferenceConversion) {
  // bf16(weight * 1), the shortest canonical sum, rounds any float.
  Prng prng(4);
  std::vector<float> values = {0.0f,
                               1e-45f,
                               std::numeric_limits<float>::max(),
                               std::numeric_limits<float>::infinity(),
                               std::numeric_limits<float>::quiet_NaN(),
                               std::bit_cast<float>(0x3F808000u),  // ties
                               std::bit_cast<float>(0x3F818000u),
                               std::bit_cast<float>(0x7F7F8000u)};  // ties to infinity
  for (int i = 0; i < 20000; ++i) {
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(prng.Next())));
  }
  const std::vector<Bf16> ones(17, ToBf16(1.0f));
  const Bf16* row = ones.data();
  const uint32_t group = 0;
  std::vector<Bf16> out(17);
  for (const float value : values) {
    kernels_.combine_row(&group, &value, &row, 1, 17, out.data());
    for (const Bf16 element : out) {
      if (std::isnan(value)) {
        EXPECT_EQ(element.bits & 0x7FFF, 0x7FC0);
      } else {
        // The sum over groups starts at +0, so that -0 becomes +0.
        EXPECT_EQ(element, ToBf16(0.0f + ToFloat(ToBf16(value)))) << value;
      }
    }
  }
}

TEST_P(NumberFormats, ExpIsWithinItsStatedError) {
  std::vector<float> x;
  for (float v = -104.5f; v < 89.5f; v += 0.00137f) x.push_back(v);
  for (float v = 1e-30f; v < 1.0f; v *= 1.07f) {
    x.push_back(v);
    x.push_back(-v);
  }
  std::vector<float> out(x.size());
  kernels_.exp(x.data(), static_cast<int64_t>(x.size()), out.data());
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    if (exact > std::numeric_limits<float>::max()) {
      EXPECT_TRUE(std::isinf(out[i])) << x[i];
      continue;
    }
    // One unit in the last place of the exact value, that of subnormals at the least.
    const double ulp = std::max(std::ldexp(1.0, std::ilogb(exact) - 23), std::ldexp(1.0, -149));
    worst = std::max(worst, std::abs(out[i] - exact) / ulp);
  }
  RecordProperty("worst_ulp", std::to_string(worst));
  EXPECT_LT(worst, 0.9);
  EXPECT_GT(worst, 0.4) << "a correctly rounded exp would be a surprise: is the test looking?";
}

TEST_P(NumberFormats, ExpEdges) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {0.0f,          -0.0f,   -infinity, infinity,
                                std::nanf(""), -105.0f, 1e30f,     -1e30f};
  std::vector<float> out(x.size());
  kernels_.exp(x.data(), static_cast<int64_t>(x.size()), out.data());
  EXPECT_EQ(out[0], 1.0f);
  EXPECT_EQ(out[1], 1.0f);
  EXPECT_EQ(out[2], 0.0f);
  EXPECT_EQ(out[3], infinity);
  EXPECT_TRUE(std::isnan(out[4]));
  EXPECT_EQ(out[5], 0.0f);
  EXPECT_EQ(out[6], infinity);
  EXPECT_EQ(out[7], 0.0f);
}

TEST_P(NumberFormats, ExpHasTheBitsOfTheBaseline) {
  std::vector<float> x;
  Prng prng(6);
  for (int i = 0; i < 100000; ++i) {
    x.push_back(std::bit_cast<float>(static_cast<uint32_t>(prng.Next())));
    x.push_back(RandomValue(prng, 40.0f));
  }
  std::erase_if(x, [](float v) { return std::isnan(v); });
  std::vector<float> out(x.size()), expected(x.size());
  const int64_t count = static_cast<int64_t>(x.size());
  kernels_.exp(x.data(), count, out.data());
  KernelsFor(CpuTarget::kPortable).exp(x.data(), count, expected.data());
  EXPECT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0);
}

TEST(NaturalLog, IsWithinTwoUnits) {
  double worst = 0;
  for (double x = 1e-300; x < 1e300; x *= 1.0123) {
    const double exact = std::log(x);
    const double ulp = std::ldexp(1.0, std::ilogb(exact) - 52);
    worst = std::max(worst, std::abs(NaturalLog(x) - exact) / ulp);
  }
  EXPECT_LT(worst, 2.0);
  EXPECT_EQ(NaturalLog(1.0), 0.0);
}

}  // namespace
}  // namespace moebius::kernels::cpu
