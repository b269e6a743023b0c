#pragma once

// What a CTA keeps in shared memory beside its slice, and what a thread keeps of its row.

#include <cstdint>

#include "kernels/cuda/sampling/row.cuh"

namespace moebius::kernels::cuda {

constexpr int kBins = kThreads;
constexpr int kMostListed = 24;     // candidates of a thread
constexpr int kFewBatches = 8;      // a slice with more has more lists, and keeps less
constexpr int kMostGathered = 256;  // of a row

struct Candidate {
  uint64_t key;
  uint64_t mass;
};

// Candidates by their weight's exponent: not above `above` but above `end`. Those above `above`
// come before it in the order, those not above `end` after it.
struct Bracket {
  float above;
  float end;
  // Whether it begins with the best candidate.
  __device__ __forceinline__ bool FromBest() const { return above == 0.0f; }
  __device__ __forceinline__ bool Has(float exponent) const {
    return exponent <= above && exponent > end;
  }
};

// Bins of equal width in the exponent, monotone in the order of candidates as the exponent is. What
// is below the last bin counts to it.
struct BinRule {
  float from;
  float per_octave;
  __device__ __forceinline__ int Of(float exponent) const {
    const float at = __fmul_rn(__fsub_rn(from, exponent), per_octave);
    return static_cast<int>(fminf(fmaxf(at, 0.0f), static_cast<float>(kBins - 1)));
  }
};
__device__ __forceinline__ BinRule BinRuleOf(Bracket bracket) {
  constexpr float kOctaves = 16.0f;  // as far as a bracket's end is finite
  return {bracket.above, static_cast<float>(kBins) /
                             (bracket.above - fmaxf(bracket.end, bracket.above - kOctaves))};
}

// The candidates in the bracket that each thread found among its own logits; it alone reads them.
struct Lists {
  // In the order of BatchOfTurn, then of numbers. What finds the list full goes to the last rows.
  float logits[kMostListed + 4][kThreads];
  // A bit for each logit of a batch, in the order of BatchOfTurn. Those of a slice with more
  // batches are where another would keep its second.
  uint32_t bits[kFewBatches][kThreads];
};

// Candidates of each bin, and the sums of their masses in two parts: exact, while the candidates
// are not more than kMostInBin.
struct BinSums {
  uint32_t high[kBins], low[kBins];  // in multiples of 2^kLowBits, and of 1
  uint32_t count[kBins];
  static constexpr int kLowBits = 21;
};
constexpr uint32_t kMostInBin = 2047;

union Histogram {
  uint4 counts[kBins];  // four counters a bin, for different lanes
  BinSums listed;
  struct {
    uint64_t mass[kBins];
    uint32_t count[kBins];
  } sums;
};

// Estimated sums over the bins of exponents up to each.
struct Curve {
  float mass[kBins];
  float spread[kBins];  // the variance of the mass
  float tops[kBins];    // threads' largest logits: counted, not sampled
  float others[kBins];
};

template <int kRanks>
struct RowMemory {
  Histogram histogram;
  ExchangeMemory<kRanks> exchange;
  Candidate gathered[kMostGathered];  // of CTA 0
  uint32_t appended;                  // 0 but between gathering and what is made of it
  uint64_t scan[2][kWarps];
  float scan_floats[4][kWarps];
  uint32_t tops[kBins];  // threads' largest logits, by their exponents
  float first_of_warp[kWarps];
  Curve curve;
  // The bin at which a running sum reaches its target, or kBins; candidates before it and in it.
  int reached;
  uint64_t count_before, count_within;
  uint64_t mass_before;
  bool has_nan;            // or an infinite maximum: no log-probability is a number
  uint32_t first_largest;  // id
  BinRule rule;            // of the bracket that was weighed last
  uint64_t total_one;      // the sum of masses at temperature 1, and its logarithm
  float log_sum;
  // What was selected: its key, and the sum of masses up to it, or 0 if nothing was.
  uint64_t chosen_key;
  uint64_t chosen_mass;
};

// The row's state in each thread's registers.
struct RowState {
  Slice slice;
  Lists* lists;
  uint32_t rank;
  int turn = 0;          // of Exchange
  bool counted = false;  // the bracket's candidates, by BinRuleOf, in histogram.listed
  int listed = 0;        // by this thread, also those that found no place in its list
  float maximum;
  float factor;  // log2(e) / temperature
};

__device__ __forceinline__ float ExponentOf(const RowState& row, float logit) {
  return WeightExponent(logit, row.maximum, row.factor);
}

__device__ __forceinline__ uint32_t& ListedBits(const RowState& row, int turn) {
  uint32_t* const bits = row.slice.Batches() <= kFewBatches
                             ? row.lists->bits[0]
                             : reinterpret_cast<uint32_t*>(row.slice.kept + kBatch / 4);
  return bits[turn * kThreads + static_cast<int>(threadIdx.x)];
}

template <int kRanks>
__device__ __forceinline__ void ClearHistogram(RowMemory<kRanks>& memory) {
  static_assert(kBins == kThreads);
  memory.histogram.counts[threadIdx.x] = make_uint4(0, 0, 0, 0);
}
// Adds to one of a bin's counters.
template <int kRanks>
__device__ __forceinline__ void CountInBin(RowMemory<kRanks>& memory, int bin, uint32_t count) {
  atomicAdd(&reinterpret_cast<uint32_t*>(memory.histogram.counts)[4 * bin + threadIdx.x % 4],
            count);
}

// Adds a candidate to a bin's sums.
template <int kRanks>
__device__ __forceinline__ void AddToBin(RowMemory<kRanks>& memory, int bin, uint64_t mass) {
  BinSums& sums = memory.histogram.listed;
  atomicAdd(&sums.high[bin], static_cast<uint32_t>(mass >> BinSums::kLowBits));
  atomicAdd(&sums.low[bin], static_cast<uint32_t>(mass) & ((1u << BinSums::kLowBits) - 1));
  atomicAdd(&sums.count[bin], 1);
}

// Copies a candidate to the gathered ones of CTA 0, where there is room.
template <int kRanks>
__device__ __forceinline__ void Gather(RowMemory<kRanks>& memory, const RowState& row, float logit,
                                       int place) {
  const uint32_t at = AddAt<kRanks>(&memory.appended, 0, 1);
  if (at >= kMostGathered) return;
  StoreAt<kRanks>(&memory.gathered[at].key, 0, CandidateKey(logit, row.slice.first_id + place));
  StoreAt<kRanks>(&memory.gathered[at].mass, 0, MassOf(ExponentOf(row, logit)));
}

// The logarithm, once, by a thread while others gather candidates.
template <int kRanks>
__device__ __forceinline__ void LogMeanwhile(RowMemory<kRanks>& memory) {
  if (threadIdx.x != kThreads - 1 || memory.total_one == 0) return;
  memory.log_sum = LogOfMass(memory.total_one);
  memory.total_one = 0;
}

// In CTA 0, of `count` gathered candidates: one to each group of threads, the first of which gets
// how many come before it and the mass of those up to it. False for all other threads.
template <int kRanks>
__device__ __forceinline__ bool RankGathered(const RowMemory<kRanks>& memory, uint32_t count,
                                             Candidate& mine, uint32_t& rank,
                                             uint64_t& mass_up_to) {
  static_assert(kMostGathered == kThreads / 2);
  const uint32_t width_log2 = count <= kThreads / 8 ? 3 : count <= kThreads / 4 ? 2 : 1;
  const uint32_t width = 1u << width_log2;
  const uint32_t at = threadIdx.x >> width_log2, part = threadIdx.x & (width - 1);
  rank = 0;
  mass_up_to = 0;
  mine = {0, 0};
  if (at < count) {
    mine = memory.gathered[at];
#pragma unroll 4
    for (uint32_t i = part; i < count; i += width) {
      const Candidate other = memory.gathered[i];
      rank += other.key < mine.key;
      if (other.key <= mine.key) mass_up_to += other.mass;
    }
  }
  __syncwarp();
  for (uint32_t distance = width / 2; distance >= 1; distance /= 2) {
    rank += __shfl_xor_sync(kAllLanes, rank, distance);
    mass_up_to += __shfl_xor_sync(kAllLanes, mass_up_to, distance);
  }
  return at < count && part == 0;
}

}  // namespace moebius::kernels::cuda
