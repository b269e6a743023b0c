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

// What is summed and listed of a batch.
struct BatchSums {
  MassSum one, row, above;
  uint32_t listed = 0;  // a bit for each of the 4 * kTogether logits
};

// Lists a logit in the bracket at `end`, an address in shared memory, or adds its weight to those
// that come before. (Written out because the compiler selects or branches where it should
// predicate.)
template <bool kHasAbove>
__device__ __forceinline__ void SortToBracket(float exponent, const MassParts& parts,
                                              Bracket bracket, float logit, uint32_t bit,
                                              BatchSums& sums, uint32_t& end) {
  if (!kHasAbove) {
    asm volatile(
        "{\n.reg .pred in;\n"
        "setp.gt.f32 in, %2, %3;\n"
        "@in st.shared.f32 [%0], %4;\n"
        "@in add.u32 %0, %0, %6;\n"
        "@in or.b32 %1, %1, %5;\n}"
        : "+r"(end), "+r"(sums.listed)
        : "f"(exponent), "f"(bracket.end), "f"(logit), "r"(bit), "n"(sizeof(float) * kThreads)
        : "memory");
    return;
  }
  asm volatile(
      "{\n.reg .pred above, in;\n"
      "setp.gt.f32 above, %4, %5;\n"
      "setp.gt.and.f32 in, %4, %6, !above;\n"
      "@above add.u32 %2, %2, %7;\n"
      "@above add.u32 %3, %3, %8;\n"
      "@in st.shared.f32 [%0], %9;\n"
      "@in add.u32 %0, %0, %11;\n"
      "@in or.b32 %1, %1, %10;\n}"
      : "+r"(end), "+r"(sums.listed), "+r"(sums.above.high), "+r"(sums.above.low)
      : "f"(exponent), "f"(bracket.above), "f"(bracket.end), "r"(parts.high), "r"(parts.low),
        "f"(logit), "r"(bit), "n"(sizeof(float) * kThreads)
      : "memory");
}

template <int kWhat>
__device__ __forceinline__ void WeighQuad(const RowState& row, Bracket bracket, const float4& quad,
                                          uint32_t first_bit, BatchSums& sums, uint32_t& end) {
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
      SortToBracket<(kWhat & kAbove) != 0>(exponent, parts, bracket, logit, first_bit << c, sums,
                                           end);
  }
}

// While half of a batch is weighed, the other half or the next batch is being loaded.
template <int kWhat>
__device__ __forceinline__ Masses WeighBatches(RowState& row, Bracket bracket, bool loaded,
                                               float4 (&quads)[kTogether]) {
  Masses masses;
  const int turns = row.slice.Batches();
  if (!loaded && turns > 0) {
    HalfOf(row.slice, BatchOfTurn(row.slice, 0), 0, false, quads);
    HalfOf(row.slice, BatchOfTurn(row.slice, 0), 1, false, quads);
  }
  uint32_t end = SharedAddress(&row.lists->logits[0][threadIdx.x]);
  const uint32_t full = SharedAddress(&row.lists->logits[kMostListed][threadIdx.x]);
  row.listed = 0;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    BatchSums sums;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = half * kHalf; q < (half + 1) * kHalf; ++q) {
        WeighQuad<kWhat>(row, bracket, quads[q], 1u << (4 * q), sums, end);
        if (kWhat & kList) end = min(end, full);
      }
      if (turn + 1 < turns) HalfOf(row.slice, BatchOfTurn(row.slice, turn + 1), half, true, quads);
    }
    if (kWhat & kAtOne) masses.one += sums.one.Total();
    if (kWhat & kSum) masses.row += sums.row.Total();
    if (kWhat & kAbove) {
      masses.above += sums.above.Total();
      masses.count_above += sums.above.Count();
    }
    if (kWhat & kList) {
      ListedBits(row, BatchOfTurn(row.slice, turn)) = sums.listed;
      row.listed += __popc(sums.listed);
    }
  }
  return masses;
}

// Calls f(logit, i) for this thread's candidates in the bracket that was weighed last. By whole
// warps: lanes that loop as often as each has candidates drift apart for long.
template <typename F>
__device__ __forceinline__ void ForEachListed(const RowState& row, F f) {
  const auto most =
      static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<uint32_t>(row.listed)));
  if (most <= kMostListed) {
#pragma unroll 1
    for (int i = 0; i < most; ++i) {
      int listed = row.listed;
      asm volatile("" : "+r"(listed));  // or the compiler would split the loop there
      if (i < listed) f(row.lists->logits[i][threadIdx.x], i);
    }
    return;
  }
  // A list was too short.
  int i = 0;
#pragma unroll 1
  for (int turn = 0; turn < row.slice.Batches(); ++turn) {
    const int batch = BatchOfTurn(row.slice, turn);
#pragma unroll 1
    for (uint32_t bits = ListedBits(row, batch); bits != 0; bits &= bits - 1) {
      const int number = 4 * kTogether * batch + __ffs(static_cast<int>(bits)) - 1;
      f(LogitOf(row.slice, number), i++);
    }
  }
}
// The place in the slice of the candidate that is number i of the list.
__device__ __forceinline__ int PlaceOfListed(const RowState& row, int i) {
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const int batch = BatchOfTurn(row.slice, turn);
    uint32_t bits = ListedBits(row, batch);
    const int count = __popc(bits);
    if (i >= count) {
      i -= count;
      continue;
    }
#pragma unroll 1
    for (; i > 0; --i) bits &= bits - 1;
    return PlaceOf(4 * kTogether * batch + __ffs(static_cast<int>(bits)) - 1);
  }
}

// Weighs the slice; what is listed is added to its bins. `quads`: the last batch, where it is
// loaded. REQUIRES: where something is listed, the histogram is zero.
template <int kWhat, int kRanks>
__device__ __forceinline__ Masses Weigh(RowMemory<kRanks>& memory, RowState& row, Bracket bracket,
                                        bool loaded, float4 (&quads)[kTogether]) {
  const Masses masses = WeighBatches<kWhat>(row, bracket, loaded, quads);
  if (kWhat & kList) {
    const BinRule rule = BinRuleOf(bracket);
    ForEachListed(row, [&](float logit, int) {
      const float exponent = ExponentOf(row, logit);
      AddToBin(memory, rule.Of(exponent), MassOf(exponent));
    });
    row.counted = true;
  }
  return masses;
}

}  // namespace moebius::kernels::cuda
