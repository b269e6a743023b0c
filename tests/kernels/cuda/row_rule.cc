#include "tests/kernels/cuda/row_rule.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"

namespace moebius::kernels::cuda {
namespace {

constexpr Bf16 kPoison{0xcdcd};

}  // namespace

RowPool::RowPool(int64_t dim, uint64_t seed) : dim_(dim) {
  Prng random(seed);
  for (int64_t row = 0; row < kRows; ++row) {
    const float scale = row % 4 == 0 ? 1.0f : row % 4 == 1 ? 1e-3f : row % 4 == 2 ? 40.0f : 1e-7f;
    const std::vector<Bf16> values = RandomBf16(random, static_cast<size_t>(dim), scale);
    values_.insert(values_.end(), values.begin(), values.end());
  }
  const auto at = [&](int64_t row, int64_t i) -> Bf16& {
    return values_[static_cast<size_t>(row * dim_ + i)];
  };
  at(3, dim / 2) = Bf16{0x7fc1};
  at(6, dim - 1) = Bf16{0xff81};  // a negative, signalling NaN
  at(9, 0) = Bf16{0xff80};
  at(9, dim - 1) = Bf16{0x7f80};
  for (int64_t i = 0; i < dim; ++i) {
    at(11, i).bits = static_cast<uint16_t>(i % 2 == 0 ? 0x7f7f : 0xff7f);
    at(12, i).bits = static_cast<uint16_t>((i % 3 == 0 ? 0x8000 : 0) | (i % 0x80));  // subnormal
    at(13, i).bits = i % 2 == 0 ? 0x8000 : 0;
  }
}

std::vector<Bf16> RowPool::Batch(int64_t m, int64_t shift, int64_t stride) const {
  if (stride == 0) stride = dim_;
  std::vector<Bf16> batch(static_cast<size_t>(m * stride), kPoison);
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(values_.begin() + Row(i, shift) * dim_, dim_, batch.begin() + i * stride);
  }
  return batch;
}

std::vector<float> RowPool::Floats(int64_t row) const {
  std::vector<float> floats;
  for (int64_t i = 0; i < dim_; ++i)
    floats.push_back(ToFloat(values_[static_cast<size_t>(row * dim_ + i)]));
  return floats;
}

std::string FindRowRuleBreach(const RowRun& run, int64_t largest, int64_t* rows) {
  std::vector<uint64_t> alone;
  for (int64_t k = 0; k < RowPool::kRows; ++k) alone.push_back(run(1, k).at(0));
  const CompetingKernel competing;
  for (const int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 512, 4096}) {
    if (m > largest) break;
    for (const int64_t shift : {0, 6, 11}) {
      const std::vector<uint64_t> hashes = run(m, shift);
      for (int64_t i = 0; i < m; ++i) {
        if (hashes.at(static_cast<size_t>(i)) !=
            alone[static_cast<size_t>(RowPool::Row(i, shift))]) {
          return absl::StrCat("m = ", m, ", place ", i, ", shift ", shift);
        }
      }
      *rows += m;
    }
  }
  if (!competing.Runs()) return "the competing kernel ended before the calls";
  return "";
}

void ExpectRowRule(const char* what, int64_t values, const RowRun& run, int64_t largest) {
  int64_t rows = 0;
  EXPECT_EQ(FindRowRuleBreach(run, largest, &rows), "") << what;
  std::printf("%s: %ld rows, %.3g values hashed\n", what, static_cast<long>(rows),
              static_cast<double>(rows * values));
}

int64_t UlpDistance(Bf16 a, Bf16 b) {
  const auto is_nan = [](Bf16 x) { return (x.bits & 0x7fff) > 0x7f80; };
  if (is_nan(a) || is_nan(b)) return is_nan(a) && is_nan(b) ? 0 : 1 << 20;
  const auto order = [](Bf16 x) -> int64_t {
    return (x.bits & 0x8000) != 0 ? -1 - (x.bits & 0x7fff) : x.bits;
  };
  return std::abs(order(a) - order(b));
}

void UlpReport::Add(Bf16 found, Bf16 expected) {
  const int64_t distance = UlpDistance(found, expected);
  ++compared;
  different += distance != 0;
  worst = std::max(worst, distance);
}

void UlpReport::Print(const char* what) const {
  std::printf("%s: %ld of %ld differ, at most %ld units in the last place\n", what,
              static_cast<long>(different), static_cast<long>(compared), static_cast<long>(worst));
}

}  // namespace moebius::kernels::cuda
