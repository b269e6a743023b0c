#pragma once

// A guess where a running sum reaches its target, from a sample: each thread's largest logit, and
// eight others that stand for the rest of its part. The guess only decides which candidates are
// listed for the exact selection; a wrong one costs time, never a bit.

#include <cstdint>

#include "kernels/cuda/sampling/selection.cuh"

namespace moebius::kernels::cuda {

// Estimated sums over the bins of exponents up to this thread's, its own included.
struct Curve {
  uint64_t mass;  // in units of 2^-24
  uint64_t mass_before;
  uint32_t count;
};

__device__ __forceinline__ int BinOf(float exponent) {
  return min(kBins - 1, static_cast<int>(exponent * static_cast<float>(-kBinsPerOctave)));
}

// REQUIRES: the histogram's memory is zero. Returns before all CTAs have read it. Leaves the sum of
// all in memory.curve_total and, in memory.bracket_end, an end of the bins that surely hold the
// `top_k` best.
__device__ inline Curve EstimateCurve(RowMemory& memory, const RowState& row, float largest,
                                      uint32_t top_k) {
  constexpr int kSamples = 8;
  if (threadIdx.x == 0) memory.bracket_end = kBins;
  // The upper half counts largest logits, the lower half weighs the others. Four counters a bin:
  // most lanes of a warp have one of few bins.
  uint32_t* const counts = reinterpret_cast<uint32_t*>(memory.histogram) + threadIdx.x % 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int rest = 4 * ((row.slice.quads - thread + kThreads - 1) / kThreads) - 1;
  if (thread < row.slice.quads) {
    atomicAdd(&counts[4 * BinOf(ExponentOf(row, largest))], 1u << 16);
    const int step = (row.slice.pieces + kSamples - 1) / kSamples;
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      int quad = min(i * step, row.slice.pieces - 1) * kThreads + thread;
      if (quad >= row.slice.quads) quad = thread;
      const int place = 4 * quad + i % 4;
      float logit = row.slice.data[place];
      if (logit == largest) logit = row.slice.data[place ^ 1];
      atomicAdd(&counts[4 * BinOf(ExponentOf(row, logit))], (rest + i) / kSamples);
    }
  }
  ClusterBarrier();
  uint32_t surely = 0, others = 0;
#pragma unroll 2
  for (int r = 0; r < kRanks; ++r) {
    const uint4 four =
        LoadCluster4(ClusterAddress(SharedAddress(&memory.histogram[threadIdx.x]), r));
    const uint32_t packed = four.x + four.y + four.z + four.w;
    surely += packed >> 16;
    others += packed & 0xffffu;
  }
  const uint32_t count = surely + others;
  const auto weight =
      static_cast<uint64_t>(16777216.0f * exp2f(-(static_cast<float>(threadIdx.x) + 0.5f) /
                                                static_cast<float>(kBinsPerOctave)));
  uint64_t mass_up_to = count * weight;
  uint64_t counts_up_to = (static_cast<uint64_t>(surely) << 32) | count;
  InclusiveScan(mass_up_to, counts_up_to, memory.scan);
  Curve curve;
  curve.mass = mass_up_to;
  curve.mass_before = mass_up_to - count * weight;
  curve.count = static_cast<uint32_t>(counts_up_to);
  const auto surely_up_to = static_cast<uint32_t>(counts_up_to >> 32);
  if (surely_up_to >= top_k && surely_up_to - surely < top_k)
    memory.bracket_end = static_cast<int>(threadIdx.x) + 1;
  if (threadIdx.x == kThreads - 1) memory.curve_total = curve.mass;
  __syncthreads();
  return curve;
}

// The bracket of the bins [begin, end).
__device__ __forceinline__ Bracket BracketOf(int begin, int end) {
  Bracket bracket;
  bracket.above = static_cast<float>(-begin) / static_cast<float>(kBinsPerOctave);
  bracket.end = end >= kBins ? -__builtin_inff()
                             : static_cast<float>(-end) / static_cast<float>(kBinsPerOctave);
  return bracket;
}

// A bracket in which the running mass passes `fraction` of all, most probably. It begins with the
// best candidate if that is not many.
__device__ inline Bracket BracketOfMass(RowMemory& memory, const Curve& curve, float fraction,
                                        int vocab) {
  constexpr uint32_t kNotMany = 3000;
  // The error of a sample of some 16,000 with weights of a normal distribution's exponentials,
  // taken four and a half times.
  const float margin = 0.06f * sqrtf(fraction * (1.0f - fraction)) + 0.001f;
  const auto part = [&](float f) {
    return static_cast<uint64_t>(static_cast<double>(memory.curve_total) * static_cast<double>(f));
  };
  const uint64_t low = part(fmaxf(fraction - margin, 0.0f)), high = part(fraction + margin);
  if (threadIdx.x == 0) {
    memory.bracket_begin = 0;
    memory.bracket_end = kBins;
  }
  __syncthreads();
  const int bin = static_cast<int>(threadIdx.x);
  if (curve.mass >= low && curve.mass_before < low) memory.bracket_begin = bin;
  if (curve.mass >= high && curve.mass_before < high) memory.bracket_end = bin + 1;
  __syncthreads();
  const int end = memory.bracket_end;
  if (bin == end - 1 && curve.count <= kNotMany) memory.bracket_begin = 0;
  __syncthreads();
  if (vocab <= kMostGathered) return BracketOf(0, kBins);
  return BracketOf(memory.bracket_begin, end);
}

}  // namespace moebius::kernels::cuda
