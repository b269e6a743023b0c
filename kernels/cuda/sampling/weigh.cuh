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

// What is done with the masses of a batch at one temperature: kSum them; kList what is in the
// bracket; kAbove sums what comes before it. And, for the slice, kAtOne: sum those at
// temperature 1.
enum Weighing { kSum = 1, kList = 2, kAbove = 4, kAtOne = 8 };

// Where a thread's next listed candidate goes, as shared-memory addresses.
struct ListEnd {
  uint32_t logit, number;
  uint32_t limit;  // of logit
};

// Adds a weight to what comes before the bracket, or lists its logit if it is in the bracket.
// (Written out because the compiler selects or branches where it should predicate.)
__device__ __forceinline__ void SortToBracket(float exponent, const MassParts& parts,
                                              Bracket bracket, float logit, int number,
                                              MassSum& above, uint32_t& count, ListEnd& list) {
  asm volatile(
      "{\n.reg .pred above, in;\n"
      "setp.gt.f32 above, %5, %6;\n"
      "setp.gt.and.f32 in, %5, %7, !above;\n"
      "setp.lt.and.u32 in, %3, %12, in;\n"
      "@above add.u32 %0, %0, %8;\n"
      "@above add.u32 %1, %1, %9;\n"
      "@above add.u32 %2, %2, 1;\n"
      "@in st.shared.f32 [%3], %10;\n"
      "@in st.shared.u16 [%4], %11;\n"
      "@in add.u32 %3, %3, %13;\n"
      "@in add.u32 %4, %4, %14;\n}"
      : "+r"(above.high), "+r"(above.low), "+r"(count), "+r"(list.logit), "+r"(list.number)
      : "f"(exponent), "f"(bracket.above), "f"(bracket.end), "r"(parts.high), "r"(parts.low),
        "f"(logit), "r"(number), "r"(list.limit), "n"(sizeof(float) * kThreads),
        "n"(sizeof(uint16_t) * kThreads)
      : "memory");
}

// Returns which of the batch's 32 logits are in the bracket; lists them itself with kAbove.
template <int kWhat>
__device__ __forceinline__ uint32_t WeighBatch(float maximum, float factor, Bracket bracket,
                                               const float4 (&quads)[kTogether], int first_number,
                                               int64_t& sum, Masses& masses, ListEnd& list) {
  MassSum all, above;
  uint32_t in = 0, count_above = 0;
#pragma unroll
  for (int q = 0; q < kTogether; ++q) {
    // Keeps the compiler from starting on all quads at once, for which registers do not suffice.
    if (kWhat & kAbove) __syncwarp();
    const float logits[4] = {quads[q].x, quads[q].y, quads[q].z, quads[q].w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float exponent = WeightExponent(logits[c], maximum, factor);
      const MassParts parts = PartsOf(exponent);
      if (kWhat & kSum) all.Add(parts);
      if (kWhat & kAbove) {
        SortToBracket(exponent, parts, bracket, logits[c], first_number + 4 * q + c, above,
                      count_above, list);
      } else if ((kWhat & kList) && exponent > bracket.end) {
        in |= 1u << (4 * q + c);
      }
    }
  }
  if (kWhat & kSum) sum += all.Total(4 * kTogether);
  if (kWhat & kAbove) {
    masses.above += above.Total(count_above);
    masses.count_above += count_above;
  }
  return in;
}

// Calls f(logit, place) for this thread's candidates in the bracket that was weighed last, in no
// order.
template <typename F>
__device__ __forceinline__ void ForEachListed(const RowState& row, Bracket bracket, F f) {
  if (row.listed <= kMostListed) {
#pragma unroll 4
    for (int i = 0; i < row.listed; ++i) {
      const int place = PlaceOf(static_cast<int>(row.lists->numbers[i][threadIdx.x]));
      if (place < row.slice.count) f(row.lists->logits[i][threadIdx.x], place);
    }
    return;
  }
  // The list was too short.
#pragma unroll 1
  for (int batch = 0; batch < row.slice.Batches(); ++batch) {
    float4 quads[kTogether];
    BatchOf(row.slice, batch, quads);
    uint32_t in = 0;
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const float logits[4] = {quads[q].x, quads[q].y, quads[q].z, quads[q].w};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (bracket.Has(ExponentOf(row, logits[c]))) in |= 1u << (4 * q + c);
    }
#pragma unroll 1
    for (; in != 0; in &= in - 1) {
      const int number = 4 * kTogether * batch + __ffs(static_cast<int>(in)) - 1;
      if (PlaceOf(number) < row.slice.count) f(LogitOf(row.slice, number), PlaceOf(number));
    }
  }
}

// Weighs the slice; `what` has kList, or is kAtOne alone. What is listed is counted too. `quads`:
// the last batch, where it is loaded.
// REQUIRES: where something is listed, the histogram is zero.
template <int kRanks>
__device__ __forceinline__ Masses Weigh(RowMemory<kRanks>& memory, RowState& row, int what,
                                        Bracket bracket, bool loaded, float4 (&quads)[kTogether]) {
  Masses masses;
  row.listed = 0;
  const int last = row.slice.Batches() - 1;
  const bool backwards = (threadIdx.x / 32) % 2 == 1;
  ListEnd list{SharedAddress(&row.lists->logits[0][threadIdx.x]),
               SharedAddress(&row.lists->numbers[0][threadIdx.x]),
               SharedAddress(&row.lists->logits[kMostListed][0])};
  for (int turn = 0; turn <= last; ++turn) {
    // Half of the warps read what is kept while the others read L2.
    const int batch = turn == 0 ? last : backwards ? last - turn : turn - 1;
    if (turn > 0 || !loaded) BatchOf(row.slice, batch, quads);
    const int first = 4 * kTogether * batch;
    uint32_t in = 0;
    if (what & kAtOne)
      WeighBatch<kSum>(row.maximum, kLog2E, bracket, quads, 0, masses.one, masses, list);
    const int at_row = what & ~kAtOne;
    if (at_row == (kSum | kList)) {
      in = WeighBatch<kSum | kList>(row.maximum, row.factor, bracket, quads, first, masses.row,
                                    masses, list);
    } else if (at_row == (kSum | kList | kAbove)) {
      in = WeighBatch<kSum | kList | kAbove>(row.maximum, row.factor, bracket, quads, first,
                                             masses.row, masses, list);
    } else if (at_row == (kList | kAbove)) {
      in = WeighBatch<kList | kAbove>(row.maximum, row.factor, bracket, quads, first, masses.row,
                                      masses, list);
    }
    for (; in != 0; in &= in - 1) {
      const int number = first + __ffs(static_cast<int>(in)) - 1;
      if (PlaceOf(number) >= row.slice.count) continue;
      if (row.listed < kMostListed)
        row.lists->numbers[row.listed][threadIdx.x] = static_cast<uint16_t>(number);
      ++row.listed;
    }
  }
  if (what == kAtOne) return masses;
  if (what & kAbove) {
    // A full list may lack some.
    row.listed =
        static_cast<int>(kMostListed - (list.limit + sizeof(float) * threadIdx.x - list.logit) /
                                           (sizeof(float) * kThreads));
    if (row.listed == kMostListed) ++row.listed;
  } else {
#pragma unroll 4
    for (int i = 0; i < min(row.listed, kMostListed); ++i) {
      row.lists->logits[i][threadIdx.x] =
          LogitOf(row.slice, static_cast<int>(row.lists->numbers[i][threadIdx.x]));
    }
  }
  const BinRule rule = BinRuleOf(bracket);
  ForEachListed(row, bracket,
                [&](float logit, int) { CountInBin(memory, rule.Of(ExponentOf(row, logit)), 1); });
  row.counted = true;
  return masses;
}

}  // namespace moebius::kernels::cuda
