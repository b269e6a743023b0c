#include "model/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/tensor_view.h"

namespace moebius::model {
namespace {

constexpr float kMaxE4m3 = 448.0f;

float ReadElement(DType dtype, const std::byte* data, int64_t index) {
  if (dtype == DType::kBf16) {
    Bf16 value;
    std::memcpy(&value, data + index * static_cast<int64_t>(sizeof(value)), sizeof(value));
    return ToFloat(value);
  }
  float value;
  std::memcpy(&value, data + index * static_cast<int64_t>(sizeof(value)), sizeof(value));
  return value;
}

}  // namespace

absl::Status QuantizeMatrix(DType dtype, absl::Span<const std::byte> bytes, int64_t rows,
                            int64_t cols, QuantizedMatrix& out) {
  CHECK(dtype == DType::kBf16 || dtype == DType::kF32);
  CHECK_EQ(static_cast<int64_t>(bytes.size()), rows * cols * SizeOf(dtype));
  const int64_t block_cols = CeilDiv(cols, kQuantBlock);
  out.codes.assign(static_cast<size_t>(rows * cols), E4m3{});
  out.scales.assign(static_cast<size_t>(CeilDiv(rows, kQuantBlock) * block_cols), 0.0f);
  for (int64_t row0 = 0; row0 < rows; row0 += kQuantBlock) {
    const int64_t row_end = std::min(row0 + kQuantBlock, rows);
    for (int64_t col0 = 0; col0 < cols; col0 += kQuantBlock) {
      const int64_t col_end = std::min(col0 + kQuantBlock, cols);
      float amax = 0;
      for (int64_t row = row0; row < row_end; ++row) {
        for (int64_t col = col0; col < col_end; ++col) {
          const float value = ReadElement(dtype, bytes.data(), row * cols + col);
          if (!std::isfinite(value)) {
            return absl::InvalidArgumentError(
                absl::StrCat("element [", row, ", ", col, "] is ", value));
          }
          amax = std::max(amax, std::fabs(value));
        }
      }
      // A scale must be above 0, also for blocks of tiny values whose quotient underflows.
      const float scale =
          amax == 0 ? 1.0f : std::max(amax / kMaxE4m3, std::numeric_limits<float>::min());
      out.scales[(row0 / kQuantBlock) * block_cols + col0 / kQuantBlock] = scale;
      for (int64_t row = row0; row < row_end; ++row) {
        for (int64_t col = col0; col < col_end; ++col) {
          const int64_t index = row * cols + col;
          out.codes[index] = ToE4m3(ReadElement(dtype, bytes.data(), index) / scale);
        }
      }
    }
  }
  return absl::OkStatus();
}

std::vector<Bf16> DequantizeMatrix(absl::Span<const std::byte> codes,
                                   absl::Span<const std::byte> scales, int64_t rows, int64_t cols) {
  const int64_t block_cols = CeilDiv(cols, kQuantBlock);
  CHECK_EQ(static_cast<int64_t>(codes.size()), rows * cols);
  CHECK_EQ(scales.size(), CeilDiv(rows, kQuantBlock) * block_cols * sizeof(float));
  std::vector<Bf16> out(static_cast<size_t>(rows * cols));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const float scale = ReadElement(DType::kF32, scales.data(),
                                      (row / kQuantBlock) * block_cols + col / kQuantBlock);
      const E4m3 code{std::to_integer<uint8_t>(codes[row * cols + col])};
      out[row * cols + col] = ToBf16(ToFloat(code) * scale);
    }
  }
  return out;
}

}  // namespace moebius::model
