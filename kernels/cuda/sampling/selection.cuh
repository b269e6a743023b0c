#pragma once

// Finding the candidate at which a running sum reaches a target, without sorting: bins of an
// interval of candidates, then of the bins that hold the crossing, until few enough are left to
// compare each with each. Sums are integers, so which intervals were taken cannot reach the result.
//
// All functions are called by all threads of all CTAs of a row alike, with equal arguments.

#include <cstdint>

#include "kernels/cuda/sampling/row_memory.cuh"
#include "kernels/cuda/sampling/weigh.cuh"

namespace moebius::kernels::cuda {

// What a target is counted in, and the value that the running sum must reach (at least 1).
struct Target {
  bool by_count;
  uint64_t value;
};

// The candidates that are left are gathered in CTA 0 (after a RowBarrier), `count` of them with
// `mass_before` and `count_before` before them: finds the one at which the sum reaches the target
// and tells all. False if none does.
// REQUIRES: chosen_mass is 0.
template <int kRanks>
__device__ inline bool ResolveGathered(RowMemory<kRanks>& memory, const RowState& row,
                                       uint32_t count, Target target, uint64_t mass_before,
                                       uint64_t count_before) {
  if (row.rank == 0) {
    Candidate mine;
    uint32_t rank;
    uint64_t mass_up_to;
    const bool exists = RankGathered(memory, count, mine, rank, mass_up_to);
    mass_up_to += mass_before;
    const bool chosen = exists && (target.by_count ? count_before + rank + 1 == target.value
                                                   : mass_up_to >= target.value &&
                                                         mass_up_to - mine.mass < target.value);
    if (chosen) {
      for (uint32_t r = 0; r < kRanks; ++r) {
        StoreAt<kRanks>(&memory.chosen_key, r, mine.key);
        StoreAt<kRanks>(&memory.chosen_mass, r, mass_up_to);
      }
    }
  }
  if (threadIdx.x == 0) memory.appended = 0;
  RowBarrier<kRanks>();
  return memory.chosen_mass > 0;
}

// Each thread has the sums of its bin: finds the bin at which the running sum, which begins below
// the target, reaches it. Results in memory, where `reached` == kBins is none, and what comes
// before is then everything. False if a thread's sums are not `exact`.
template <int kRanks>
__device__ inline bool FindBin(RowMemory<kRanks>& memory, Target target, uint64_t mass,
                               uint64_t count, bool exact, uint64_t mass_before,
                               uint64_t count_before) {
  // Only the warp in which that is adds up bin by bin.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t mass_of_warp = AddWarp(mass);
  const uint32_t count_of_warp = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(count));
  if (lane == 0) {
    memory.scan[0][warp] = mass_of_warp;
    memory.scan[1][warp] = count_of_warp;
  }
  const bool all_exact = __syncthreads_or(!exact) == 0;
  const bool before = lane < warp;
  mass_before += AddWarp(before ? memory.scan[0][lane] : 0);
  count_before +=
      __reduce_add_sync(kAllLanes, before ? static_cast<uint32_t>(memory.scan[1][lane]) : 0);
  const uint64_t sum_before = target.by_count ? count_before : mass_before;
  const uint64_t sum_up_to = sum_before + (target.by_count ? count_of_warp : mass_of_warp);
  const bool reached = sum_before < target.value && sum_up_to >= target.value;
  if (reached) {
    uint64_t mass_up_to = mass, count_up_to = count;
    ScanWarp(mass_up_to);
    ScanWarp(count_up_to);
    mass_up_to += mass_before;
    count_up_to += count_before;
    const uint64_t sum = target.by_count ? count_up_to : mass_up_to;
    if (sum >= target.value && sum - (target.by_count ? count : mass) < target.value) {
      memory.reached = static_cast<int>(threadIdx.x);
      memory.mass_before = mass_up_to - mass;
      memory.count_before = count_up_to - count;
      memory.count_within = count;
    }
  } else if (threadIdx.x == kBins - 1 && sum_up_to < target.value) {
    memory.reached = kBins;
    memory.mass_before = mass_before + mass_of_warp;
    memory.count_before = count_before + count_of_warp;
    memory.count_within = count;
  }
  __syncthreads();
  return all_exact;
}

// Zeroes the histogram once no CTA reads it any more.
template <int kRanks>
__device__ __forceinline__ void ClearForAll(RowMemory<kRanks>& memory) {
  RowBarrier<kRanks>();
  ClearHistogram(memory);
  RowBarrier<kRanks>();
}

// Among the candidates of the bracket that was weighed last; `mass_before` and `count_before` it.
// False if the target is not reached among them, when `mass_before` becomes that before the
// bracket's end, or if too many are alike.
template <int kRanks>
__device__ inline bool SelectBracketed(RowMemory<kRanks>& memory, RowState& row,
                                       uint64_t& mass_before, uint64_t count_before,
                                       Target target) {
  BinRule rule = memory.rule;
  const BinRule outer = rule;  // of the first round; the second looks at one of its bins
  int outer_bin = 0;
  uint64_t before = mass_before;
  for (int round = 0; round < 2; ++round) {
    const auto bin_of = [&](float exponent) {
      return round == 1 && outer.Of(exponent) != outer_bin ? -1 : rule.Of(exponent);
    };
    if (round == 1 || !row.counted) {
      ClearForAll(memory);
      ForEachListed(row, [&](float logit) {
        const float exponent = ExponentOf(row, logit);
        const int bin = bin_of(exponent);
        if (bin >= 0) AddToBin(memory, bin, MassOf(exponent));
      });
      RowBarrier<kRanks>();
      row.counted = round == 0;
    }
    uint64_t mass = 0, count = 0;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      const auto rank = static_cast<uint32_t>(r);
      const BinSums& sums = memory.histogram.listed;
      mass += (static_cast<uint64_t>(LoadAt<kRanks>(&sums.high[threadIdx.x], rank))
               << BinSums::kLowBits) +
              LoadAt<kRanks>(&sums.low[threadIdx.x], rank);
      count += LoadAt<kRanks>(&sums.count[threadIdx.x], rank);
    }
    if (!FindBin(memory, target, mass, count, count <= kMostInBin, before, count_before))
      return false;
    const int reached = memory.reached;
    before = memory.mass_before;
    if (reached == kBins) {
      mass_before = before;
      return false;
    }
    count_before = memory.count_before;
    if (memory.count_within <= kMostGathered) {
      if (threadIdx.x == 0) memory.chosen_mass = 0;
      LogMeanwhile(memory);
      ForListed(
          row, [&](float logit) { return bin_of(ExponentOf(row, logit)) == reached; },
          [&](float logit, int place) { Gather(memory, row, logit, place); });
      RowBarrier<kRanks>();
      return ResolveGathered(memory, row, static_cast<uint32_t>(memory.count_within), target,
                             before, count_before);
    }
    outer_bin = reached;
    rule.from = outer.from - static_cast<float>(reached) / outer.per_octave;
    rule.per_octave = outer.per_octave * static_cast<float>(kBins);
  }
  return false;
}

// AddWarpToBins: for a warp's lanes that have a bin (>= 0) each; where all have the same, once.
template <int kRanks>
__device__ __forceinline__ void AddWarpToBins(RowMemory<kRanks>& memory, int bin, uint64_t mass) {
  auto& sums = memory.histogram.sums;
  const auto add = [&](int at, uint64_t of_mass, uint32_t count) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&sums.mass[at]), of_mass);
    atomicAdd(&sums.count[at], count);
  };
  const uint32_t active = __ballot_sync(kAllLanes, bin >= 0);
  if (active == 0) return;
  const int leader = __ffs(static_cast<int>(active)) - 1;
  const int common = __shfl_sync(kAllLanes, bin, leader);
  if (__popc(active) < 8 || __any_sync(kAllLanes, bin >= 0 && bin != common)) {
    if (bin >= 0) add(bin, mass, 1);
    return;
  }
  mass = FoldLanes<Fold::kSum, 32>(bin < 0 ? 0 : mass);
  if (static_cast<int>(threadIdx.x % 32) == leader)
    add(common, mass, static_cast<uint32_t>(__popc(active)));
}

// Among all candidates of the row, whatever they are: bins of keys, 9 bits a step. Leaves nothing
// chosen if the target is not reached.
template <int kRanks>
__device__ inline void SelectAny(RowMemory<kRanks>& memory, RowState& row, Target target) {
  constexpr int kBitsAStep = 9;
  static_assert(kBins == 1 << kBitsAStep);
  uint64_t first = 0;  // of the interval's keys
  uint64_t mass_before = 0, count_before = 0;
  const int numbers = 4 * kTogether * row.slice.Batches();
  row.counted = false;
  LogMeanwhile(memory);
  for (int shift = 32 + kIdBits - kBitsAStep;; shift = max(0, shift - kBitsAStep)) {
    if (threadIdx.x == 0) memory.chosen_mass = 0;
    ClearForAll(memory);
    const auto for_each = [&](auto f) {  // f(logit, place, bin or -1), by whole warps
#pragma unroll 1
      for (int number = 0; number < numbers; ++number) {
        const int place = PlaceOf(number);
        const bool exists = place < row.slice.count;
        const float logit = exists ? LogitOf(row.slice, number) : 0.0f;
        const uint64_t key = CandidateKey(logit, row.slice.first_id + place);
        const uint64_t bin = (key - first) >> shift;
        f(logit, place, exists && key >= first && bin < kBins ? static_cast<int>(bin) : -1);
      }
    };
    for_each([&](float logit, int, int bin) {
      AddWarpToBins(memory, bin, bin >= 0 ? MassOf(ExponentOf(row, logit)) : 0);
    });
    RowBarrier<kRanks>();
    uint64_t mass = 0, count = 0;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      // Loads of 16 bytes: two bins' masses, four bins' counts.
      const auto rank = static_cast<uint32_t>(r);
      const uint4 masses = LoadAt<kRanks>(
          reinterpret_cast<const uint4*>(memory.histogram.sums.mass) + threadIdx.x / 2, rank);
      const uint4 counts = LoadAt<kRanks>(
          reinterpret_cast<const uint4*>(memory.histogram.sums.count) + threadIdx.x / 4, rank);
      const bool odd = threadIdx.x % 2 == 1;
      mass +=
          (static_cast<uint64_t>(odd ? masses.w : masses.y) << 32) | (odd ? masses.z : masses.x);
      count += threadIdx.x % 4 < 2 ? (odd ? counts.y : counts.x) : (odd ? counts.w : counts.z);
    }
    FindBin(memory, target, mass, count, true, mass_before, count_before);
    const int found = memory.reached;
    const bool few = found < kBins && memory.count_within <= kMostGathered;
    if (few) {
      for_each([&](float logit, int place, int bin) {
        if (bin == found) Gather(memory, row, logit, place);
      });
    }
    RowBarrier<kRanks>();        // all have gathered, and read the histograms
    if (found == kBins) return;  // not by a caller that keeps its word
    first += static_cast<uint64_t>(found) << shift;
    mass_before = memory.mass_before;
    count_before = memory.count_before;
    if (few) break;
  }
  ResolveGathered(memory, row, static_cast<uint32_t>(memory.count_within), target, mass_before,
                  count_before);
}

}  // namespace moebius::kernels::cuda
