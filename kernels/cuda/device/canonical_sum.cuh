#pragma once

// The canonical sum of a token's expert rows (kernels/moe.h, CombineParams) for one vector of the
// row: per gate group P_g = bf16(fma chain over its experts, ascending), then bf16(float32 sum of
// P_g, ascending). Element by element the operations of kernels/reference in their order.

#include <cstdint>

#include "kernels/cuda/device/row_vector.cuh"

namespace moebius::kernels::cuda {

inline constexpr int kCanonicalSumMaxTopK = 64;

// What all tokens of a call share; device pointers.
struct ExpertRows {
  int top_k;
  uint32_t experts_per_group;
  const uint32_t* experts;  // [m, top_k], ascending within a token
  const float* weights;     // [m, top_k]
  const uint16_t* buffer;   // with row_index [m, top_k], or ..
  const int32_t* row_index;
  const uint16_t* const* rows;  // .. [m, top_k] pointers
  uint64_t policy;              // of L2, for the rows
};

inline constexpr int kCanonicalRowsInFlight = 8;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Vector `at` of a token's sum, eight rows in flight at once. kWhole: top_k is a multiple of eight.
// All lanes of the warp take part; those past the row's end get numbers of no meaning.
// `loads_issued` is called once eight rows are on their way.
template <bool kAligned, bool kWhole, typename Called>
__device__ __forceinline__ RowVector CanonicalSum(const ExpertRows& in, int64_t token, int at,
                                                  int dim, const Called& loads_issued) {
  constexpr int kInFlight = kCanonicalRowsInFlight;
  const int64_t slots = token * in.top_k;
  // Vectors past the end read the last one, slots past the last read that one: loads without
  // conditions are all issued before the first is waited for.
  const int from = kAligned ? min(at, dim - kVectorElements) : at;
  const int end = kAligned ? from + kVectorElements : dim;
  const int lane = static_cast<int>(threadIdx.x % 32);

  float chain[kVectorElements], total[kVectorElements];
#pragma unroll
  for (int i = 0; i < kVectorElements; ++i) chain[i] = total[i] = 0.0f;
  const auto end_group = [&] {
    // Whichever NaN the conversion makes, the sum makes its own.
    RowVector rounded;
#pragma unroll
    for (int i = 0; i < kVectorElements / 2; ++i)
      rounded.pair[i] = RoundNumbersToBf16Pair(chain[2 * i], chain[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) total[i] = __fadd_rn(total[i], rounded.At(i));
  };
  uint32_t last_group = ~0u;  // no group before the first
  for (int first = 0; first < in.top_k; first += kInFlight) {
    // Lane j reads what belongs to slot first + j, one load for all eight, and hands it round.
    const int64_t mine = slots + min(first + lane, in.top_k - 1);
    const uint32_t expert = in.experts[mine];
    const float my_weight = in.weights[mine];
    RowVector x[kInFlight];
    if (in.rows == nullptr) {
      const int32_t my_row = in.row_index[mine];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int64_t row = __shfl_sync(kAllLanes, my_row, j);
        x[j] = LoadVector<kAligned>(in.buffer + row * dim, from, end, in.policy);
      }
    } else {
      const auto my_row = reinterpret_cast<unsigned long long>(in.rows[mine]);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const unsigned long long row = __shfl_sync(kAllLanes, my_row, j);
        x[j] = LoadVector<kAligned>(reinterpret_cast<const uint16_t*>(row), from, end, in.policy);
      }
    }
    loads_issued();
    const uint32_t group = expert / in.experts_per_group;
    uint32_t before = __shfl_up_sync(kAllLanes, group, 1);
    if (lane == 0) before = last_group;
    last_group = __shfl_sync(kAllLanes, group, kInFlight - 1);
    // Bit j: slot first + j is the first of its group.
    const uint32_t starts = __ballot_sync(kAllLanes, group != before);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (!kWhole && first + j >= in.top_k) continue;
      const float weight = __shfl_sync(kAllLanes, my_weight, j);
      if (starts >> j & 1) {
        if (first + j > 0) end_group();
#pragma unroll
        for (int i = 0; i < kVectorElements; ++i) chain[i] = __fmul_rn(weight, x[j].At(i));
      } else {
#pragma unroll
        for (int i = 0; i < kVectorElements; ++i)
          chain[i] = __fmaf_rn(weight, x[j].At(i), chain[i]);
      }
    }
  }
  end_group();
  return RoundVector(total);
}

}  // namespace moebius::kernels::cuda
