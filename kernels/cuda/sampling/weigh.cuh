#pragma once

// The pass that sums a slice's weights, and on the way sums those that come before a bracket and
// lists those in it.

#include <cstdint>

#include "kernels/cuda/sampling/row_memory.cuh"

namespace moebius::kernels::cuda {

struct Masses {
  int64_t one = 0;    // at temperature 1; 0 if that is the row's
  int64_t row = 0;    // at the row's temperature
  int64_t above = 0;  // of them, those before the bracket
  uint32_t count_above = 0;
};

// What is done with the weights: kSum them; kList those in the bracket; kAbove sums those that come
// before it; kAtOne sums those at temperature 1. kReplaceNan counts NaN as -infinity, which the
// arithmetic of weights does not.
enum Weighing { kSum = 1, kList = 2, kAbove = 4, kAtOne = 8, kReplaceNan = 16 };

// The batches in the order in which a pass weighs them: first the one that may be in registers;
// then half of the warps read what is kept while the others read L2.
__device__ __forceinline__ int BatchOfTurn(const Slice& slice, int turn) {
  const int last = slice.Batches() - 1;
  const bool backwards = (threadIdx.x / 32) % 2 == 1;
  return turn == 0 ? last : backwards ? last - turn : turn - 1;
}

// What is summed and listed.
struct BatchSums {
  MassSum one, row;
  CountedMassSum above;
  // Of half a batch: kNoneListed and a bit for each of the 2 * kTogether logits.
  float listed = kNoneListed;
  static constexpr float kNoneListed = 8388608.0f;  // 2^23
  __device__ __forceinline__ uint32_t TakeListed() {
    const uint32_t bits = __float_as_uint(listed) & 0xffffu;
    listed = kNoneListed;
    return bits;
  }
};

// Lists a logit in the bracket at `end`, an address in shared memory, or adds its weight to those
// that come before. Written out because the compiler selects or branches where it should predicate.
// What can be an addition of floats is one: they have a pipe of their own.
template <bool kHasAbove>
__device__ __forceinline__ void SortToBracket(float exponent, const MassParts& parts,
                                              Bracket bracket, float logit, float bit,
                                              BatchSums& sums, uint32_t& end) {
  constexpr uint32_t kStep = sizeof(float) * kThreads;
  if (!kHasAbove) {
    asm volatile(
        "{\n.reg .pred in;\n"
        "setp.gt.f32 in, %2, %3;\n"
        "@in st.shared.f32 [%0], %4;\n"
        "@in add.u32 %0, %0, %6;\n"
        "@in add.rn.f32 %1, %1, %5;\n}"
        : "+r"(end), "+f"(sums.listed)
        : "f"(exponent), "f"(bracket.end), "f"(logit), "f"(bit), "n"(kStep)
        : "memory");
    return;
  }
  asm volatile(
      "{\n.reg .pred above, in;\n"
      "setp.gt.f32 above, %5, %6;\n"
      "setp.gt.and.f32 in, %5, %7, !above;\n"
      "@above add.rn.f32 %2, %2, 0f3F800000;\n"
      "@above add.rn.f32 %3, %3, %8;\n"
      "@above add.u32 %4, %4, %9;\n"
      "@in st.shared.f32 [%0], %10;\n"
      "@in add.u32 %0, %0, %12;\n"
      "@in add.rn.f32 %1, %1, %11;\n}"
      : "+r"(end), "+f"(sums.listed), "+f"(sums.above.count), "+f"(sums.above.less_high),
        "+r"(sums.above.low)
      : "f"(exponent), "f"(bracket.above), "f"(bracket.end), "f"(parts.less_high), "r"(parts.low),
        "f"(logit), "f"(bit), "n"(kStep)
      : "memory");
}

template <int kWhat>
__device__ __forceinline__ void WeighQuad(const RowState& row, Bracket bracket, const float4& quad,
                                          float first_bit, BatchSums& sums, uint32_t& end) {
  const float logits[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float logit = kWhat & kReplaceNan ? fmaxf(logits[c], -__builtin_inff()) : logits[c];
    const float distance = __fsub_rn(logit, row.maximum);
    if (kWhat & kAtOne) sums.one.Add(PartsOf(__fmul_rn(distance, kLog2E)));
    if (!(kWhat & (kSum | kList))) continue;
    const float exponent = __fmul_rn(distance, row.factor);
    const MassParts parts = PartsOf(exponent);
    if (kWhat & kSum) sums.row.Add(parts);
    if (kWhat & kList)
      SortToBracket<(kWhat & kAbove) != 0>(exponent, parts, bracket, logit,
                                           first_bit * static_cast<float>(1 << c), sums, end);
  }
}

// While half of a batch is weighed, the other half or the next batch is being loaded.
template <int kWhat, bool kVectors>
__device__ __forceinline__ Masses WeighBatches(RowState& row, Bracket bracket, bool loaded,
                                               float4 (&quads)[kTogether]) {
  Masses masses;
  const int turns = row.slice.Batches();
  if (!loaded && turns > 0) {
    HalfOf<kVectors>(row.slice, BatchOfTurn(row.slice, 0), 0, false, quads);
    HalfOf<kVectors>(row.slice, BatchOfTurn(row.slice, 0), 1, false, quads);
  }
  uint32_t end = SharedAddress(&row.lists->logits[0][threadIdx.x]);
  const uint32_t full = SharedAddress(&row.lists->logits[kMostListed][threadIdx.x]);
  row.listed = 0;
  BatchSums sums;
  // The batches of BatchOfTurn.
  const int first = BatchOfTurn(row.slice, 1);
  const int step = first == 0 ? 1 : -1;
  int next = first;
  uint32_t* bits = &ListedBits(row, 0);
#pragma unroll 1
  for (int left = turns; left > 0; --left) {
    uint32_t listed = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = half * kHalf; q < (half + 1) * kHalf; ++q) {
        WeighQuad<kWhat>(row, bracket, quads[q], static_cast<float>(1u << (4 * (q - half * kHalf))),
                         sums, end);
        if (kWhat & kList) end = min(end, full);
      }
      if (kWhat & kList) listed |= sums.TakeListed() << (4 * half * kHalf);
      if (left > 1) HalfOf<kVectors>(row.slice, next, half, true, quads);
    }
    if (kWhat & kAbove) sums.above.Flush();
    if (kWhat & kList) {
      *bits = listed;
      bits += kThreads;
      row.listed += __popc(listed);
    }
    next += step;
  }
  const auto count = static_cast<uint32_t>(4 * kTogether * turns);
  if (kWhat & kAtOne) masses.one = sums.one.TotalOf(count);
  if (kWhat & kSum) masses.row = sums.row.TotalOf(count);
  if (kWhat & kAbove) {
    masses.above = sums.above.Total();
    masses.count_above = sums.above.Count();
  }
  return masses;
}

// Calls f(logit, i) for this thread's candidates in the bracket that was weighed last, which are in
// its list. By whole warps: lanes that loop as often as each has candidates drift apart for long.
template <typename F>
__device__ __forceinline__ void ForEachInList(const RowState& row, int most, F f) {
  constexpr int kAtOnce = 4;
  static_assert(kMostListed % kAtOnce == 0);
#pragma unroll 1
  for (int first = 0; first < most; first += kAtOnce) {
    float logits[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) logits[i] = row.lists->logits[first + i][threadIdx.x];
    int listed = row.listed;
    asm volatile("" : "+r"(listed));  // or the compiler would split the loop there
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < listed) f(logits[i], first + i);
  }
}
// Calls f(logit, place in the slice) for each, where a list was too short.
template <typename F>
__device__ __forceinline__ void ForEachOfBits(const RowState& row, F f) {
#pragma unroll 1
  for (int turn = 0; turn < row.slice.Batches(); ++turn) {
    const int batch = BatchOfTurn(row.slice, turn);
#pragma unroll 1
    for (uint32_t bits = ListedBits(row, turn); bits != 0; bits &= bits - 1) {
      const int number = 4 * kTogether * batch + __ffs(static_cast<int>(bits)) - 1;
      f(LogitOf(row.slice, number), PlaceOf(number));
    }
  }
}
__device__ __forceinline__ int MostListedOfWarp(const RowState& row) {
  return static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<uint32_t>(row.listed)));
}
// Calls f(logit) for each.
template <typename F>
__device__ __forceinline__ void ForEachListed(const RowState& row, F f) {
  const int most = MostListedOfWarp(row);
  if (most <= kMostListed) {
    ForEachInList(row, most, [&](float logit, int) { f(logit); });
  } else {
    ForEachOfBits(row, [&](float logit, int) { f(logit); });
  }
}
// The place in the slice of the candidate that is number i of the list.
__device__ __forceinline__ int PlaceOfListed(const RowState& row, int i) {
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    uint32_t bits = ListedBits(row, turn);
    const int count = __popc(bits);
    if (i >= count) {
      i -= count;
      continue;
    }
#pragma unroll 1
    for (; i > 0; --i) bits &= bits - 1;
    return PlaceOf(4 * kTogether * BatchOfTurn(row.slice, turn) + __ffs(static_cast<int>(bits)) -
                   1);
  }
}

// Calls f(logit, place) for those that are wanted(logit): few.
template <typename Wanted, typename F>
__device__ __forceinline__ void ForListed(const RowState& row, Wanted wanted, F f) {
  static_assert(kMostListed < 32);
  const int most = MostListedOfWarp(row);
  if (most <= kMostListed) {
    uint32_t found = 0;
    ForEachInList(row, most, [&](float logit, int i) {
      if (wanted(logit)) found |= 1u << i;
    });
#pragma unroll 1
    for (; found != 0; found &= found - 1) {
      const int i = __ffs(static_cast<int>(found)) - 1;
      f(row.lists->logits[i][threadIdx.x], PlaceOfListed(row, i));
    }
  } else {
    ForEachOfBits(row, [&](float logit, int place) {
      if (wanted(logit)) f(logit, place);
    });
  }
}

// Weighs the slice; what is listed is added to its bins. `quads`: the last batch, where it is
// loaded. REQUIRES: where something is listed, the histogram is zero.
template <int kWhat, bool kVectors, int kRanks>
__device__ __forceinline__ Masses Weigh(RowMemory<kRanks>& memory, RowState& row, Bracket bracket,
                                        bool loaded, float4 (&quads)[kTogether]) {
  const Masses masses = WeighBatches<kWhat, kVectors>(row, bracket, loaded, quads);
  if (kWhat & kList) {
    const BinRule rule = BinRuleOf(bracket);
    if (threadIdx.x == 0) memory.rule = rule;
    ForEachListed(row, [&](float logit) {
      const float exponent = ExponentOf(row, logit);
      AddToBin(memory, rule.Of(exponent), MassOf(exponent));
    });
    row.counted = true;
  }
  return masses;
}

}  // namespace moebius::kernels::cuda
