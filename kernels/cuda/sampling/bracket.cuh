#pragma once

// A guess where a running sum reaches its target, from a sample: half of the logits, counted
// while the row is loaded, and each thread's largest. The guess only decides which candidates are
// listed for the exact selection; a wrong one costs time, never a bit.

#include <cstdint>

#include "kernels/cuda/sampling/row_memory.cuh"

namespace moebius::kernels::cuda {

constexpr int kBinsPerOctave = 32;   // of weights: bin b holds exponents around -b / 32
constexpr float kNotMany = 3000.0f;  // candidates that are no burden to list

// The bins of the sample: of logits, since the row's largest is not yet known. `top` is above most
// of them.
struct SampleBins {
  float top;
  float per_logit;  // bins
  __device__ __forceinline__ int Of(float logit) const {
    const float at = fmaxf(fminf((top - logit) * per_logit, static_cast<float>(kBins - 1)), 0.0f);
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    return __float_as_int(at + kMagic) - __float_as_int(kMagic);
  }
};
constexpr int kSampledOf = 2;  // one of so many logits: of even quads the even ones, of odd the odd
__device__ __forceinline__ bool IsSampled(int number) { return (number / 4 + number) % 2 == 0; }

// From the largest logit of those a CTA loads first.
template <int kRanks>
__device__ __forceinline__ SampleBins MakeSampleBins(RowMemory<kRanks>& memory, const float4& first,
                                                     float factor) {
  constexpr float kHeadroom = 64.0f;  // bins
  const float largest = fmaxf(fmaxf(first.x, first.y), fmaxf(first.z, first.w));
  const uint32_t of_warp = __reduce_max_sync(kAllLanes, OrderedBits(largest));
  if (threadIdx.x % 32 == 0) memory.first_of_warp[threadIdx.x / 32] = FromOrderedBits(of_warp);
  __syncthreads();
  float top = memory.first_of_warp[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) top = fmaxf(top, memory.first_of_warp[w]);
  if (fabsf(top) == __builtin_inff()) top = 0.0f;
  const float per_logit = factor * static_cast<float>(kBinsPerOctave);
  return {top + kHeadroom / per_logit, per_logit};
}

__device__ __forceinline__ int BinOf(float exponent) {
  const float at = 0.5f - exponent * static_cast<float>(kBinsPerOctave);
  return static_cast<int>(fminf(at, static_cast<float>(kBins - 1)));
}

// Leaves the estimated sums over the bins of exponents in memory.curve, and the histogram zero.
// REQUIRES: counted are the sample in the histogram, but for threads' largest logits, and these in
// memory.tops, by the bins of their exponents.
template <int kRanks>
__device__ inline void EstimateCurve(RowMemory<kRanks>& memory, const RowState& row,
                                     const SampleBins& bins) {
  __syncthreads();
  const int bin = static_cast<int>(threadIdx.x);
  // A bin of exponents lies across two of the sample's.
  const float shift = fmaxf(fminf((bins.top - row.maximum) * bins.per_logit, 1e4f), -1e4f) +
                      static_cast<float>(bin);
  const int from = static_cast<int>(floorf(shift));
  const float part = shift - floorf(shift);
  const auto sample_at = [&](int at) {
    if (at < 0 || at >= kBins) return 0.0f;
    const uint4 four = memory.histogram.counts[at];
    return static_cast<float>(static_cast<int>(four.x + four.y + four.z + four.w));
  };
  float sampled = (1.0f - part) * sample_at(from) + part * sample_at(from + 1);
  auto tops = static_cast<float>(memory.tops[bin]);
  if (kRanks > 1) {
    __syncthreads();
    memory.histogram.counts[bin] =
        make_uint4(__float_as_uint(sampled), __float_as_uint(tops), 0, 0);
    RowBarrier<kRanks>();
    sampled = tops = 0.0f;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      const uint4 both = LoadAt<kRanks>(&memory.histogram.counts[bin], static_cast<uint32_t>(r));
      sampled += __uint_as_float(both.x);
      tops += __uint_as_float(both.y);
    }
  }
  const float weight = exp2f(static_cast<float>(-bin) / static_cast<float>(kBinsPerOctave));
  const auto scale = static_cast<float>(kSampledOf);
  const float others = scale * sampled;
  float sums[4] = {weight * (tops + others), weight * weight * scale * others, tops, others};
  InclusiveScan(sums, memory.scan_floats);
  if (kRanks > 1) RowBarrier<kRanks>();  // all have read
  ClearHistogram(memory);
  memory.curve.mass[bin] = sums[0];
  memory.curve.spread[bin] = sums[1];
  memory.curve.tops[bin] = sums[2];
  memory.curve.others[bin] = sums[3];
  __syncthreads();
}

// The bracket of the bins [begin, end).
__device__ __forceinline__ Bracket BracketOf(int begin, int end) {
  constexpr float kOctave = static_cast<float>(kBinsPerOctave);
  return {begin == 0 ? 0.0f : (0.5f - static_cast<float>(begin)) / kOctave,
          end >= kBins ? -__builtin_inff() : (0.5f - static_cast<float>(end)) / kOctave};
}
// The same, from the best candidate if that is not many.
__device__ __forceinline__ Bracket BracketOfBins(const Curve& curve, int begin, int end) {
  end = min(end, kBins);
  if (curve.tops[end - 1] + curve.others[end - 1] <= kNotMany) begin = 0;
  return BracketOf(min(begin, end - 1), end);
}

// How many deviations a guess allows for.
constexpr float kDeviations = 3.5f;

// A bracket in which the running mass passes `mass`, in the curve's units, most probably.
template <int kRanks>
__device__ inline Bracket BracketAround(const RowMemory<kRanks>& memory, float mass,
                                        float deviation) {
  const float margin = kDeviations * deviation + 0.0005f * memory.curve.mass[kBins - 1];
  const float here = memory.curve.mass[threadIdx.x];
  const int begin = __syncthreads_count(here < mass - margin);
  const int end = __syncthreads_count(here < mass + margin) + 1;
  return BracketOfBins(memory.curve, begin, end);
}
// `fraction`: of all mass, which is not known exactly.
template <int kRanks>
__device__ inline Bracket BracketOfMass(const RowMemory<kRanks>& memory, float fraction,
                                        int vocab) {
  if (vocab <= kMostGathered) return BracketOf(0, kBins);
  const Curve& curve = memory.curve;
  const float total = curve.mass[kBins - 1];
  fraction = fminf(fraction, 1.0f);
  const int bin = min(__syncthreads_count(curve.mass[threadIdx.x] < fraction * total), kBins - 1);
  // What is sampled before the target and after it moves the share before it in opposite ways.
  const float before = curve.spread[bin];
  const float after = curve.spread[kBins - 1] - before;
  const float rest = 1.0f - fraction;
  return BracketAround(memory, fraction * total,
                       sqrtf(rest * rest * before + fraction * fraction * after));
}
// Once it is known exactly what lies before an edge of a bracket: another, around the place where
// the running mass is `distance` more than that.
template <int kRanks>
__device__ inline Bracket BracketFrom(const RowMemory<kRanks>& memory, float edge, float distance) {
  const Curve& curve = memory.curve;
  const int begin = BinOf(edge);
  const float mass = (begin > 0 ? curve.mass[begin - 1] : 0.0f) + distance;
  const float spread = begin > 0 ? curve.spread[begin - 1] : 0.0f;
  const int bin = min(__syncthreads_count(curve.mass[threadIdx.x] < mass), kBins - 1);
  return BracketAround(memory, mass, sqrtf(fabsf(curve.spread[bin] - spread)));
}

// A bracket that holds the `top_k`-th candidate: surely, if that takes not many.
template <int kRanks>
__device__ inline Bracket BracketOfCount(const RowMemory<kRanks>& memory, uint32_t top_k,
                                         int vocab) {
  if (vocab <= kMostGathered) return BracketOf(0, kBins);
  const Curve& curve = memory.curve;
  const auto k = static_cast<float>(top_k);
  const float tops = curve.tops[threadIdx.x], others = curve.others[threadIdx.x];
  const int surely = __syncthreads_count(tops < k) + 1;
  if (surely <= kBins && curve.tops[surely - 1] + curve.others[surely - 1] <= kNotMany)
    return BracketOf(0, surely);
  const float count = tops + others;
  const float margin = kDeviations * sqrtf(static_cast<float>(kSampledOf) * others + 1.0f);
  const int begin = __syncthreads_count(count + margin < k);
  const int end = __syncthreads_count(count - margin < k) + 1;
  return BracketOfBins(curve, begin, end);
}

}  // namespace moebius::kernels::cuda
