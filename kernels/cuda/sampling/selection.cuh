#pragma once

// Finding the candidate at which a running sum reaches a target, without sorting: a histogram over
// an interval of candidates, then over the bin that holds the crossing, until few enough are left
// to compare each with each. Sums are integers, so which intervals were taken cannot reach the
// result.
//
// All functions are called by all threads of all CTAs of a cluster alike, with equal arguments.

#include <cstdint>

#include "kernels/cuda/sampling/row_cluster.cuh"

namespace moebius::kernels::cuda {

constexpr int kBins = kThreads;
constexpr int kMostListed = 2048;   // of a CTA
constexpr int kMostGathered = 128;  // of a cluster
constexpr int kBinsPerOctave =
    16;  // of weights: bin b holds the exponents (-(b + 1) / 16, -b / 16]

struct Candidate {
  uint64_t key;
  uint64_t mass;
};

// Candidates by their weight's exponent: not above `above` but above `end`. Those above `above`
// come before it in the order, those not above `end` after it.
struct Bracket {
  float above;
  float end;
};

// What a target is counted in, and the value that the running sum must reach (at least 1).
struct Target {
  bool by_count;
  uint64_t value;
};

// The shared memory of a CTA beside its slice.
struct RowMemory {
  uint64_t barriers[kMostCopies];
  Announced announced;
  uint4 histogram[kBins];  // masses in limbs of 14 bits (x, y, z) and the number of candidates (w)
  uint16_t list[kMostListed];  // places in the slice of the candidates in the bracket
  Candidate gathered[kMostGathered];
  uint64_t scan[2][kWarps];
  uint32_t counts_of_bin[kRanks];
  uint64_t found_mass;  // before the crossing bin
  uint64_t found_count;
  uint32_t found_bin;  // kBins: the sum of all does not reach the target
  uint32_t found_size;
  int listed;  // in the bracket, also those that found no place in `list`
  int appended;
  int bracket_begin, bracket_end;
  uint64_t curve_total;
  float log_sum;
  uint64_t chosen_key;
  uint64_t chosen_mass;  // the running sum of masses, the chosen one's included
  uint32_t chosen;
};

// The row's state in each thread's registers.
struct RowState {
  Slice slice;
  uint32_t rank;
  float maximum;
  float factor;  // log2(e) / temperature
};

__device__ __forceinline__ float ExponentOf(const RowState& row, float logit) {
  return WeightExponent(logit, row.maximum, row.factor);
}
__device__ __forceinline__ uint64_t KeyOf(const RowState& row, int place) {
  return CandidateKey(row.slice.data[place], row.slice.first_id + place);
}

// Inclusive sums of two values over the threads of the CTA. memory.scan may be used again after a
// __syncthreads.
__device__ __forceinline__ void InclusiveScan(uint64_t& x, uint64_t& y,
                                              uint64_t (&scratch)[2][kWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t lower_x = __shfl_up_sync(kAllLanes, x, distance);
    const uint64_t lower_y = __shfl_up_sync(kAllLanes, y, distance);
    if (lane >= distance) {
      x += lower_x;
      y += lower_y;
    }
  }
  if (lane == 31) {
    scratch[0][warp] = x;
    scratch[1][warp] = y;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps - 1; ++w) {
    x += w < warp ? scratch[0][w] : 0;
    y += w < warp ? scratch[1][w] : 0;
  }
}

__device__ __forceinline__ void AddToBin(uint4& bin, uint64_t mass) {
  constexpr uint32_t kLimb = (1u << 14) - 1;
  atomicAdd(&bin.x, static_cast<uint32_t>(mass) & kLimb);
  atomicAdd(&bin.y, static_cast<uint32_t>(mass >> 14) & kLimb);
  atomicAdd(&bin.z, static_cast<uint32_t>(mass >> 28));
  atomicAdd(&bin.w, 1u);
}

// AddToBin for a warp's lanes that have a bin (>= 0) each; where all have the same, once.
__device__ __forceinline__ void AddWarpToBins(uint4* histogram, int bin, uint64_t mass) {
  const uint32_t active = __ballot_sync(kAllLanes, bin >= 0);
  if (active == 0) return;
  const int leader = __ffs(static_cast<int>(active)) - 1;
  const int common = __shfl_sync(kAllLanes, bin, leader);
  if (__popc(active) < 8 || __any_sync(kAllLanes, bin >= 0 && bin != common)) {
    if (bin >= 0) AddToBin(histogram[bin], mass);
    return;
  }
  if (bin < 0) mass = 0;
  mass = WarpSum(mass);
  if (static_cast<int>(threadIdx.x % 32) != leader) return;
  constexpr uint32_t kLimb = (1u << 14) - 1;
  atomicAdd(&histogram[common].x, static_cast<uint32_t>(mass) & kLimb);
  atomicAdd(&histogram[common].y, static_cast<uint32_t>(mass >> 14) & kLimb);
  atomicAdd(&histogram[common].z, static_cast<uint32_t>(mass >> 28));
  atomicAdd(&histogram[common].w, __popc(active));
}

// Sums the histograms of all CTAs and finds the bin in which the running sum, `mass_before` and
// `count_before` included, reaches the target. Results in memory.found_..., equal in all CTAs.
__device__ inline void FindCrossing(RowMemory& memory, Target target, uint64_t mass_before,
                                    uint64_t count_before) {
  if (threadIdx.x == 0) memory.found_bin = kBins;
  ClusterBarrier();
  const uint32_t address = SharedAddress(&memory.histogram[threadIdx.x]);
  uint64_t mass = 0, count = 0;
#pragma unroll
  for (int r = 0; r < kRanks; ++r) {
    const uint4 bin = LoadCluster4(ClusterAddress(address, r));
    mass += bin.x + (static_cast<uint64_t>(bin.y) << 14) + (static_cast<uint64_t>(bin.z) << 28);
    count += bin.w;
  }
  uint64_t mass_up_to = mass, count_up_to = count;
  InclusiveScan(mass_up_to, count_up_to, memory.scan);
  mass_up_to += mass_before;
  count_up_to += count_before;
  const uint64_t reached = target.by_count ? count_up_to : mass_up_to;
  const uint64_t step = target.by_count ? count : mass;
  if (reached >= target.value && reached - step < target.value) {
    memory.found_bin = threadIdx.x;
    memory.found_mass = mass_up_to - mass;
    memory.found_count = count_up_to - count;
    memory.found_size = static_cast<uint32_t>(count);
  }
  __syncthreads();
  if (threadIdx.x < kRanks && memory.found_bin < kBins) {
    memory.counts_of_bin[threadIdx.x] =
        LoadCluster4(
            ClusterAddress(SharedAddress(&memory.histogram[memory.found_bin]), threadIdx.x))
            .w;
  }
  __syncthreads();
}

__device__ __forceinline__ void ClearHistogram(RowMemory& memory) {
  memory.histogram[threadIdx.x] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x == 0) memory.appended = 0;
  __syncthreads();
}

// Copies a candidate to the gathered list of CTA 0; `before`: how many those of lower ranks add.
__device__ __forceinline__ void Gather(RowMemory& memory, const RowState& row, int place,
                                       uint32_t before) {
  const uint32_t at = before + static_cast<uint32_t>(atomicAdd(&memory.appended, 1));
  const uint32_t to = ClusterAddress(SharedAddress(&memory.gathered[at]), 0);
  StoreCluster(to, KeyOf(row, place));
  StoreCluster(to + 8, MassOf(ExponentOf(row, row.slice.data[place])));
}

// One thread a gathered candidate: its rank among them and the mass of those up to it.
__device__ __forceinline__ void RankGathered(const RowMemory& memory, uint32_t count, uint64_t key,
                                             uint32_t& rank, uint64_t& mass_up_to) {
  rank = 0;
  mass_up_to = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < count; ++i) {
    const Candidate other = memory.gathered[i];
    rank += other.key < key;
    if (other.key <= key) mass_up_to += other.mass;
  }
}

// The crossing bin's candidates are gathered in CTA 0 (after a ClusterBarrier): it finds the one at
// which the sum reaches the target and tells all.
__device__ inline void ResolveCrossing(RowMemory& memory, const RowState& row, Target target) {
  if (row.rank == 0 && threadIdx.x < memory.found_size) {
    const Candidate mine = memory.gathered[threadIdx.x];
    uint32_t rank;
    uint64_t mass_up_to;
    RankGathered(memory, memory.found_size, mine.key, rank, mass_up_to);
    mass_up_to += memory.found_mass;
    const uint64_t count_up_to = memory.found_count + rank + 1;
    const bool chosen = target.by_count
                            ? count_up_to == target.value
                            : mass_up_to >= target.value && mass_up_to - mine.mass < target.value;
    if (chosen) {
      for (int r = 0; r < kRanks; ++r) {
        StoreCluster(ClusterAddress(SharedAddress(&memory.chosen_key), r), mine.key);
        StoreCluster(ClusterAddress(SharedAddress(&memory.chosen_mass), r), mass_up_to);
      }
    }
  }
  ClusterBarrier();
}

// Among the candidates of a bracket. False if the target is not reached among them, or too many
// share a bin.
__device__ inline bool SelectBracketed(RowMemory& memory, const RowState& row, Bracket bracket,
                                       uint64_t mass_before, Target target) {
  // A CTA whose list was too short looks at its whole slice again.
  const bool all = memory.listed > kMostListed;
  const int count = all ? 4 * row.slice.quads : memory.listed;
  const auto place_of = [&](int i) { return all ? i : static_cast<int>(memory.list[i]); };
  // Bins of equal width in the exponent, monotone in the order of candidates as the exponent is;
  // then the same over the bin with the crossing. What is below the last bin counts to it.
  float above = bracket.above;
  float scale = static_cast<float>(kBins) /
                (above - fmaxf(bracket.end, static_cast<float>(-kBins / kBinsPerOctave)));
  const float first_scale = scale;
  int first_bin = -1;  // that the second round looks at
  const auto bin_with = [&](float from, float by, float exponent) {
    const float at = __fmul_rn(__fsub_rn(from, exponent), by);
    return static_cast<int>(fminf(fmaxf(at, 0.0f), static_cast<float>(kBins - 1)));
  };
  const auto bin_of = [&](float exponent) {
    if (!(exponent <= bracket.above && exponent > bracket.end)) return -1;
    if (first_bin >= 0 && bin_with(bracket.above, first_scale, exponent) != first_bin) return -1;
    return bin_with(above, scale, exponent);
  };
  uint64_t count_before = 0;
  for (int round = 0; round < 2; ++round) {
    ClearHistogram(memory);
    for (int base = 0; base < count; base += kThreads) {
      const int i = base + static_cast<int>(threadIdx.x);
      int bin = -1;
      float exponent = kLeastExponent;
      if (i < count) {
        exponent = ExponentOf(row, row.slice.data[place_of(i)]);
        bin = bin_of(exponent);
      }
      AddWarpToBins(memory.histogram, bin, bin >= 0 ? MassOf(exponent) : 0);
    }
    __syncthreads();
    FindCrossing(memory, target, mass_before, count_before);
    const bool found = memory.found_bin < kBins;
    if (found && memory.found_size <= kMostGathered) {
      uint32_t before = 0;
      for (uint32_t r = 0; r < row.rank; ++r) before += memory.counts_of_bin[r];
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int place = place_of(i);
        if (bin_of(ExponentOf(row, row.slice.data[place])) == static_cast<int>(memory.found_bin))
          Gather(memory, row, place, before);
      }
      ClusterBarrier();
      ResolveCrossing(memory, row, target);
      return true;
    }
    if (found) {
      first_bin = static_cast<int>(memory.found_bin);
      mass_before = memory.found_mass;
      count_before = memory.found_count;
      above = bracket.above - static_cast<float>(first_bin) / first_scale;
      scale = first_scale * static_cast<float>(kBins);
    }
    ClusterBarrier();  // all have read the histograms
    if (!found) return false;
  }
  return false;
}

// Among all candidates of the row, whatever they are: bins of keys, 8 bits a step.
// REQUIRES: the target is reached.
__device__ inline void SelectAny(RowMemory& memory, const RowState& row, Target target) {
  uint64_t first = 0;  // of the interval's keys
  uint64_t mass_before = 0, count_before = 0;
  for (int shift = 32 + kIdBits - 8;; shift = max(0, shift - 8)) {
    ClearHistogram(memory);
    const auto bin_of = [&](uint64_t key) {
      const uint64_t bin = (key - first) >> shift;
      return key >= first && bin < kBins ? static_cast<int>(bin) : -1;
    };
    for (int base = 0; base < 4 * row.slice.quads; base += kThreads) {
      const int place = base + static_cast<int>(threadIdx.x);
      const bool exists = place < 4 * row.slice.quads;
      const int bin = exists ? bin_of(KeyOf(row, place)) : -1;
      AddWarpToBins(memory.histogram, bin,
                    bin >= 0 ? MassOf(ExponentOf(row, row.slice.data[place])) : 0);
    }
    __syncthreads();
    FindCrossing(memory, target, mass_before, count_before);
    if (memory.found_bin == kBins) {  // not by a caller that keeps its word
      ClusterBarrier();
      return;
    }
    const bool few = memory.found_size <= kMostGathered;
    if (few) {
      uint32_t before = 0;
      for (uint32_t r = 0; r < row.rank; ++r) before += memory.counts_of_bin[r];
      for (int place = threadIdx.x; place < 4 * row.slice.quads; place += kThreads) {
        if (bin_of(KeyOf(row, place)) == static_cast<int>(memory.found_bin))
          Gather(memory, row, place, before);
      }
    }
    first += static_cast<uint64_t>(memory.found_bin) << shift;
    mass_before = memory.found_mass;
    count_before = memory.found_count;
    ClusterBarrier();  // all have gathered, and read the histograms
    if (few) break;
  }
  ResolveCrossing(memory, row, target);
}

}  // namespace moebius::kernels::cuda
