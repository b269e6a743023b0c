#pragma once

// The row rule (docs/exactness.md) for operations on BF16 rows: a row's result has the same bits
// wherever the row stands, however many there are, whatever its neighbours hold.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/float_formats.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {

// Sixteen rows of `dim` values: random ones of several sizes, and one each with a NaN, infinities,
// the largest and the smallest numbers, zeros of both signs.
class RowPool {
 public:
  static constexpr int64_t kRows = 16;
  RowPool(int64_t dim, uint64_t seed);

  // Which row of the pool stands at place i of a batch; shift 0 .. kRows - 1. Row(0, shift) =
  // shift.
  static int64_t Row(int64_t i, int64_t shift) { return (i * 5 + shift) % kRows; }
  // [m, stride]: row i is Row(i, shift), its stride filled with poison.
  std::vector<Bf16> Batch(int64_t m, int64_t shift, int64_t stride = 0) const;
  std::vector<float> Floats(int64_t row) const;
  int64_t dim() const { return dim_; }

 private:
  int64_t dim_;
  std::vector<Bf16> values_;  // [kRows, dim]
};

// A hash for each row of a result, over as many arrays as it has.
class RowHashes {
 public:
  explicit RowHashes(int64_t m) : hashes_(static_cast<size_t>(m)) {}
  // The first `count` of every `stride` elements belong to a row.
  template <typename T>
  void Add(const std::vector<T>& values, int64_t count, int64_t stride) {
    for (size_t i = 0; i < hashes_.size(); ++i) {
      hashes_[i] = Hash64(values.data() + static_cast<int64_t>(i) * stride,
                          static_cast<size_t>(count) * sizeof(T), hashes_[i]);
    }
  }
  const std::vector<uint64_t>& hashes() const { return hashes_; }

 private:
  std::vector<uint64_t> hashes_;
};

// `run(m, shift)` computes the batch whose row i is made of pool row RowPool::Row(i, shift) and
// gives a hash for each row. Every row of batches of 1 to 4,096, beside a competing kernel, must
// hash as it does alone. `run` must not wait for the whole device (cudaDeviceSynchronize,
// cudaFree): that waits for the competing kernel.
using RowRun = std::function<std::vector<uint64_t>(int64_t m, int64_t shift)>;

// Names the first row that differs; empty if none does. Batches of up to `largest` rows; adds to
// *rows how many were compared.
std::string FindRowRuleBreach(const RowRun& run, int64_t largest, int64_t* rows);

// Expects none. `values`: how many a row has, for the count printed.
void ExpectRowRule(const char* what, int64_t values, const RowRun& run, int64_t largest = 4096);

// Steps between two BF16 values on the number line (-0 and +0 are one step apart); NaN equals NaN.
int64_t UlpDistance(Bf16 a, Bf16 b);

// How far results are from what they are compared with.
struct UlpReport {
  int64_t compared = 0;
  int64_t different = 0;
  int64_t worst = 0;
  void Add(Bf16 found, Bf16 expected);
  // Prints "what: N of M differ, at most K units in the last place".
  void Print(const char* what) const;
};

}  // namespace moebius::kernels::cuda
