// Goal: block quantisation has the published rule at every block, ragged ones too, and
// dequantisation is its reading back; the error of a round trip is that of e4m3.

#include "model/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::model {
namespace {

template <typename T>
absl::Span<const std::byte> AsBytes(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

TEST(Quantize, RaggedBlocksHaveTheirOwnScales) {
  const int64_t rows = 144, cols = 300;
  std::vector<float> w(rows * cols);
  Prng prng(1);
  for (float& x : w) x = prng.Unit() - 0.5f;
  w[143 * cols + 299] = -896.0f;  // in the last, ragged block
  QuantizedMatrix q;
  ASSERT_TRUE(QuantizeMatrix(DType::kF32, AsBytes(w), rows, cols, q).ok());
  ASSERT_EQ(q.scales.size(), 2u * 3);
  EXPECT_EQ(q.scales[5], 2.0f);
  EXPECT_EQ(q.codes[143 * cols + 299].bits, 0xFE);  // -448
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const float scale = q.scales[row / 128 * 3 + col / 128];
      const float value = ToFloat(q.codes[row * cols + col]) * scale;
      // Three mantissa bits: half a unit is 1/16 of the value; below 2^-6 the spacing is fixed.
      const float bound = std::max(std::fabs(w[row * cols + col]) / 16, scale / 1024);
      EXPECT_LE(std::fabs(value - w[row * cols + col]), bound) << row << "," << col;
    }
  }
  const std::vector<Bf16> back = DequantizeMatrix(AsBytes(q.codes), AsBytes(q.scales), rows, cols);
  for (int64_t i = 0; i < rows * cols; ++i) {
    EXPECT_EQ(back[i], ToBf16(ToFloat(q.codes[i]) * q.scales[i / cols / 128 * 3 + i % cols / 128]));
  }
}

TEST(Quantize, KnownCodes) {
  // Bytes 1 apart from alignment, as a mapped file may have them.
  std::vector<std::byte> bytes(1 + 4 * 4);
  const float values[4] = {448.0f, 1.0f, -0.5f, 0.001953125f};
  std::memcpy(bytes.data() + 1, values, sizeof(values));
  QuantizedMatrix q;
  ASSERT_TRUE(QuantizeMatrix(DType::kF32, absl::MakeConstSpan(bytes).subspan(1), 2, 2, q).ok());
  EXPECT_EQ(q.scales, std::vector<float>{1.0f});
  EXPECT_EQ(q.codes, (std::vector<E4m3>{{0x7E}, {0x38}, {0xB0}, {0x01}}));
}

TEST(Quantize, ZeroAndTinyBlocksKeepAPositiveScale) {
  for (const float value : {0.0f, 1e-44f, -1e-38f}) {
    const std::vector<float> w(9, value);
    QuantizedMatrix q;
    ASSERT_TRUE(QuantizeMatrix(DType::kF32, AsBytes(w), 3, 3, q).ok());
    EXPECT_GT(q.scales[0], 0.0f);
    EXPECT_TRUE(std::isfinite(q.scales[0]));
    EXPECT_NEAR(ToFloat(q.codes[0]) * q.scales[0], value, 1e-38);
  }
}

TEST(Quantize, RefusesWhatIsNotFinite) {
  std::vector<Bf16> w(6, ToBf16(1.0f));
  w[4] = ToBf16(std::numeric_limits<float>::infinity());
  QuantizedMatrix q;
  const absl::Status status = QuantizeMatrix(DType::kBf16, AsBytes(w), 2, 3, q);
  EXPECT_EQ(status.message(), "element [1, 1] is inf");
}

}  // namespace
}  // namespace moebius::model
