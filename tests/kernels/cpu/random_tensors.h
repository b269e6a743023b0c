#pragma once

// Seeded tensors for kernel tests, and the distance between two results.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/float_formats.h"
#include "base/hash.h"
#include "base/prng.h"
#include "base/tensor_view.h"

namespace moebius::kernels::cpu {

// Roughly normal: the sum of four uniforms, scaled to standard deviation `deviation`.
inline float RandomValue(Prng& prng, float deviation = 1.0f) {
  float sum = 0.0f;
  for (int i = 0; i < 4; ++i) sum += prng.Unit() - 0.5f;
  return sum * deviation * 1.7320508f;
}

inline std::vector<float> RandomFloats(Prng& prng, int64_t count, float deviation = 1.0f) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) value = RandomValue(prng, deviation);
  return out;
}

inline std::vector<Bf16> RandomBf16(Prng& prng, int64_t count, float deviation = 1.0f) {
  std::vector<Bf16> out(static_cast<size_t>(count));
  for (Bf16& value : out) value = ToBf16(RandomValue(prng, deviation));
  return out;
}

// A weight that owns its storage, each product of a unit-variance row having about unit variance.
class RandomMatrix {
 public:
  RandomMatrix(Prng& prng, DType dtype, int64_t rows, int64_t cols) {
    view_.dtype = dtype;
    view_.rows = rows;
    view_.cols = cols;
    data_.resize(static_cast<size_t>(view_.bytes()));
    const float deviation = 1.0f / std::sqrt(static_cast<float>(cols));
    if (dtype == DType::kE4m3) {
      scales_.resize(static_cast<size_t>(CeilDiv(rows, kQuantBlock) * CeilDiv(cols, kQuantBlock)));
      for (float& scale : scales_) scale = deviation / 64.0f * (0.5f + prng.Unit());
      // All codes but NaN, subnormals and both zeros included.
      for (std::byte& code : data_) {
        const E4m3 value = ToE4m3(RandomValue(prng, 64.0f));
        code = static_cast<std::byte>(prng.Below(16) == 0 ? value.bits & 0x87 : value.bits);
      }
    } else if (dtype == DType::kBf16) {
      const std::vector<Bf16> values = RandomBf16(prng, rows * cols, deviation);
      std::memcpy(data_.data(), values.data(), data_.size());
    } else {
      const std::vector<float> values = RandomFloats(prng, rows * cols, deviation);
      std::memcpy(data_.data(), values.data(), data_.size());
    }
  }
  RandomMatrix(RandomMatrix&&) = default;

  // Valid while the matrix lives.
  MatrixView view() const {
    MatrixView view = view_;
    view.data = data_.data();
    if (view.dtype == DType::kE4m3) view.scale_inv = scales_.data();
    return view;
  }
  std::byte* mutable_data() { return data_.data(); }

 private:
  MatrixView view_;
  std::vector<std::byte> data_;
  std::vector<float> scales_;
};

inline float AsFloat(float value) { return value; }
inline float AsFloat(Bf16 value) { return ToFloat(value); }

// 1 - 2 sum(xy) / sum(x^2 + y^2) in double: the field's measure of a kernel's error. NaN anywhere
// gives NaN, which fails every comparison.
template <typename A, typename B>
double CalcDiff(const std::vector<A>& x, const std::vector<B>& y) {
  double cross = 0, squares = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double a = AsFloat(x[i]), b = AsFloat(y[i]);
    cross += a * b;
    squares += a * a + b * b;
  }
  return squares == 0 ? 0 : 1 - 2 * cross / squares;
}

template <typename T>
uint64_t HashRow(const T* values, int64_t count, uint64_t seed = 0) {
  return Hash64(values, static_cast<size_t>(count) * sizeof(T), seed);
}

}  // namespace moebius::kernels::cpu
