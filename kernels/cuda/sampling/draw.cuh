#pragma once

// Drawing a token once the row's masses are known: among few candidates at once, or by one
// selection after the other.

#include <cstdint>

#include "kernels/cuda/sampling/bracket.cuh"
#include "kernels/cuda/sampling/selection.cuh"
#include "kernels/cuda/sampling/weigh.cuh"
#include "kernels/sampling.h"

namespace moebius::kernels::cuda {

// What is drawn from a row, and the guess where.
struct Draw {
  Bracket bracket;
  uint64_t total;
  uint64_t mass_above;  // the bracket
  uint64_t count_above;
  uint32_t top_k;  // 0: all
  float top_p;
  float u;
};

// The value that a running mass must reach to be `fraction` of `mass`; within [1, mass].
__device__ __forceinline__ uint64_t TopPTarget(float fraction, uint64_t mass) {
  const double target = ceil(static_cast<double>(fraction) * static_cast<double>(mass));
  if (!(target >= 1.0)) return 1;
  return target >= static_cast<double>(mass) ? mass : static_cast<uint64_t>(target);
}
// The least integer above u * mass.
__device__ __forceinline__ uint64_t DrawTarget(float u, uint64_t mass) {
  return static_cast<uint64_t>(static_cast<double>(u) * static_cast<double>(mass)) + 1;
}

// Whether the bracket is complete for DrawAmongFew and its candidates so few that this is faster
// than a selection for each step: comparing 230 with each other takes three times as long as one.
__device__ __forceinline__ bool AreFew(const Draw& draw, Bracket bracket, uint64_t listed) {
  const int steps = 1 + (draw.top_k > 0 ? 1 : 0) + (draw.top_p < 1.0f ? 1 : 0);
  return bracket.FromBest() && listed >= draw.top_k &&
         listed <= static_cast<uint64_t>(kMostGathered / 4 * steps);
}

// All steps of a draw among a complete bracket of few candidates: CTA 0 gathers, compares each with
// each, and tells the others the key and, in chosen_mass, whether the token is among them.
template <int kRanks>
__device__ inline bool DrawAmongFew(RowMemory<kRanks>& memory, const RowState& row, uint32_t count,
                                    const Draw& draw) {
  LogMeanwhile(memory);
  ForListed(
      row, [](float) { return true; },
      [&](float logit, int place) { Gather(memory, row, logit, place); });
  RowBarrier<kRanks>();
  if (row.rank == 0) {
    if (threadIdx.x == 0) memory.appended = 0;
    Candidate mine;
    uint32_t rank;
    uint64_t mass_up_to;
    const bool exists = RankGathered(memory, count, mine, rank, mass_up_to);
    uint64_t mass = draw.total;
    if (draw.top_k > 0) {
      if (exists && rank + 1 == draw.top_k) memory.mass_before = mass_up_to;
      __syncthreads();
      mass = memory.mass_before;
    }
    // The running sum at the candidate that reaches the target; 0: not reached among these.
    const auto reach = [&](uint64_t target) {
      if (threadIdx.x == 0) memory.chosen_mass = 0;
      __syncthreads();
      if (exists && mass_up_to >= target && mass_up_to - mine.mass < target) {
        memory.chosen_mass = mass_up_to;
        memory.chosen_key = mine.key;
      }
      __syncthreads();
      const uint64_t reached = memory.chosen_mass;
      __syncthreads();
      return reached;
    };
    if (draw.top_p < 1.0f) mass = reach(TopPTarget(draw.top_p, mass));
    if (mass > 0) mass = reach(DrawTarget(draw.u, mass));
    if (kRanks > 1 && threadIdx.x > 0 && threadIdx.x < kRanks) {
      StoreAt<kRanks>(&memory.chosen_key, threadIdx.x, memory.chosen_key);
      StoreAt<kRanks>(&memory.chosen_mass, threadIdx.x, mass);
    }
  }
  RowBarrier<kRanks>();
  return memory.chosen_mass > 0;
}

// The draw in the general case. Leaves the token's key in chosen_key.
template <bool kVectors, int kRanks>
__device__ __forceinline__ void DrawBySelection(RowMemory<kRanks>& memory, RowState& row,
                                                const Draw& draw) {
  Bracket bracket = draw.bracket;
  uint64_t mass_above = draw.mass_above;
  uint64_t mass = draw.total;
  const bool has_top_p = draw.top_p < 1.0f;
  enum { kTopK, kTopP, kDrawn };
  for (int step = draw.top_k > 0 ? kTopK
                  : has_top_p    ? kTopP
                                 : kDrawn;
       step <= kDrawn; step += step == kTopK && !has_top_p ? 2 : 1) {
    Target target{step == kTopK, draw.top_k};
    if (step == kTopP) target.value = TopPTarget(draw.top_p, mass);
    if (step == kDrawn) target.value = DrawTarget(draw.u, mass);
    bool found = false;
    for (int attempt = 0; !found && attempt < 3; ++attempt) {
      // What is known to lie before an edge of the bracket.
      float edge = bracket.above;
      uint64_t mass_before = mass_above;
      if (target.value > (target.by_count ? draw.count_above : mass_above)) {
        found = SelectBracketed(memory, row, mass_before, draw.count_above, target);
        if (found || target.by_count || mass_before == mass_above) break;
        edge = bracket.end;
      }
      if (target.by_count) break;
      // The bracket was another target's, or missed. List those around this one's place.
      const double distance = static_cast<double>(target.value) - static_cast<double>(mass_before);
      bracket = BracketFrom(memory, edge,
                            static_cast<float>(distance / static_cast<double>(1ull << kMassBits)));
      ClearForAll(memory);
      float4 quads[kTogether];
      const Masses masses =
          Weigh<kList | kAbove | kReplaceNan, kVectors>(memory, row, bracket, false, quads);
      uint64_t above[1] = {static_cast<uint64_t>(masses.above)};
      Exchange<Fold::kSum>(memory.exchange, row.rank, row.turn, above);
      mass_above = above[0];
    }
    if (!found) SelectAny(memory, row, target);
    mass = memory.chosen_mass;
    if (step < kDrawn) __syncthreads();
  }
}

}  // namespace moebius::kernels::cuda
