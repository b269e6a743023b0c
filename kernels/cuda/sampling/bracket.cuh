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
  float top = 0.0f;
  float per_logit = 0.0f;  // bins
  float share = 0.0f;      // the same, as a part of all bins
  uint32_t counters = 0;   // see Count
  // Adding kMagic rounds to an integer, which then stands in the low bits.
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  __device__ __forceinline__ uint32_t Bits(float logit) const {
    const float at = __saturatef((top - logit) * share);
    return __float_as_uint(__fmaf_rn(at, static_cast<float>(kBins - 1), kMagic));
  }
  __device__ __forceinline__ int Of(float logit) const {
    return static_cast<int>(Bits(logit) - __float_as_uint(kMagic));
  }
  // CountInBin(memory, Of(logit), 1) in fewer instructions.
  __device__ __forceinline__ void Count(float logit) const {
    const uint32_t at = counters + static_cast<uint32_t>(sizeof(uint4)) * Bits(logit);
    asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(at) : "memory");
  }
};
constexpr int kSampledOf = 2;  // one of so many logits: of even quads the even ones, of odd the odd

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
  const uint32_t counters = SharedAddress(&memory.histogram.counts[0]) +
                            static_cast<uint32_t>(sizeof(uint32_t)) * (threadIdx.x % 4);
  return {top + kHeadroom / per_logit, per_logit, per_logit / static_cast<float>(kBins - 1),
          counters - static_cast<uint32_t>(sizeof(uint4)) * __float_as_uint(SampleBins::kMagic)};
}

// Bins of exponents, and their parts.
__device__ __forceinline__ float PlaceOnAxis(float exponent) {
  return 0.5f - exponent * static_cast<float>(kBinsPerOctave);
}
__device__ __forceinline__ int BinOf(float exponent) {
  return static_cast<int>(fminf(PlaceOnAxis(exponent), static_cast<float>(kBins - 1)));
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
    const uint4 four = memory.histogram.counts[at];
    return static_cast<float>(static_cast<int>(four.x + four.y + four.z + four.w));
  };
  // The last bin holds all that is smaller, too.
  float sampled = bin == kBins - 1 ? sample_at(bin) : 0.0f;
  if (from >= 0 && from < kBins - 1) sampled += (1.0f - part) * sample_at(from);
  if (from >= -1 && from < kBins - 2) sampled += part * sample_at(from + 1);
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
  const float weight =
      exp2f(static_cast<float>(-bin) * (1.0f / static_cast<float>(kBinsPerOctave)));
  const auto scale = static_cast<float>(kSampledOf);
  const float others = scale * sampled;
  float sums[4] = {weight * (tops + others), weight * weight * others, tops, others};
  InclusiveScan(sums, memory.scan_floats);
  if (kRanks > 1) RowBarrier<kRanks>();  // all have read
  ClearHistogram(memory);
  memory.curve.mass[bin] = sums[0];
  memory.curve.spread[bin] = sums[1];
  memory.curve.tops[bin] = sums[2];
  memory.curve.others[bin] = sums[3];
  __syncthreads();
}

// The bracket of the bins [begin, end), or of parts of bins.
__device__ __forceinline__ Bracket BracketOf(float begin, float end) {
  constexpr float kOctave = static_cast<float>(kBinsPerOctave);
  return {begin <= 0.0f ? 0.0f : (0.5f - begin) / kOctave,
          end >= static_cast<float>(kBins) ? kLeastExponent : (0.5f - end) / kOctave};
}
// The same, from the best candidate if that is not many.
__device__ __forceinline__ Bracket BracketOfBins(const Curve& curve, float begin, float end) {
  end = fminf(end, static_cast<float>(kBins));
  const int last = static_cast<int>(ceilf(end)) - 1;
  if (curve.tops[last] + curve.others[last] <= kNotMany) begin = 0.0f;
  return BracketOf(fminf(begin, static_cast<float>(last)), end);
}

// How many deviations a guess allows for.
constexpr float kDeviations = 4.2f;

// Where the curve passes `mass` at `bin`, in bins: a part of a bin where its candidates are many,
// `few` parts where they are not.
__device__ __forceinline__ float PlaceOnCurve(const Curve& curve, int bin, float mass, float few) {
  constexpr float kMany = 100.0f;
  const auto place = static_cast<float>(bin);
  if (bin == 0 || bin >= kBins) return place + few;
  const float before = curve.mass[bin - 1];
  const bool many = curve.others[bin] - curve.others[bin - 1] > kMany;
  return place + (many ? __fdividef(mass - before, curve.mass[bin] - before) : few);
}

// A bracket in which the running mass passes a value between `least` and `most`, in the curve's
// units, most probably.
template <int kRanks>
__device__ inline Bracket BracketAround(const RowMemory<kRanks>& memory, float least, float most,
                                        float variance) {
  const Curve& curve = memory.curve;
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(variance));
  const float margin = kDeviations * root + 0.0005f * curve.mass[kBins - 1];
  least -= margin;
  most += margin;
  const float mass = curve.mass[threadIdx.x];
  const int begin = __syncthreads_count(mass < least), end = __syncthreads_count(mass < most);
  return BracketOfBins(curve, PlaceOnCurve(curve, begin, least, 0.0f),
                       PlaceOnCurve(curve, end, most, 1.0f));
}
// `fraction`: of all mass, which is not known exactly.
template <int kRanks>
__device__ inline Bracket BracketOfMass(const RowMemory<kRanks>& memory, float fraction,
                                        int vocab) {
  if (vocab <= kMostGathered) return BracketOf(0.0f, kBins);
  const Curve& curve = memory.curve;
  const float total = curve.mass[kBins - 1];
  fraction = fminf(fraction, 1.0f);
  const int bin = min(__syncthreads_count(curve.mass[threadIdx.x] < fraction * total), kBins - 1);
  // What is sampled before the target and after it moves the share before it in opposite ways.
  const float before = curve.spread[bin];
  const float after = curve.spread[kBins - 1] - before;
  const float rest = 1.0f - fraction;
  // What is in the last bin may have far less mass.
  const float surely = fmaxf(curve.mass[kBins - 2], 0.98f * total);
  return BracketAround(memory, fraction * surely, fraction * total,
                       rest * rest * before + fraction * fraction * after);
}
// Once it is known exactly what lies before an edge of a bracket: another, around the place where
// the running mass is `distance` more than that.
template <int kRanks>
__device__ inline Bracket BracketFrom(const RowMemory<kRanks>& memory, float edge, float distance) {
  const Curve& curve = memory.curve;
  float mass = distance, spread = 0.0f;
  const float place = fminf(PlaceOnAxis(edge), static_cast<float>(kBins - 1));
  if (const int begin = static_cast<int>(place); begin > 0) {
    const float part = place - static_cast<float>(begin);
    mass += curve.mass[begin - 1] + part * (curve.mass[begin] - curve.mass[begin - 1]);
    spread = curve.spread[begin - 1] + part * (curve.spread[begin] - curve.spread[begin - 1]);
  }
  const int bin = min(__syncthreads_count(curve.mass[threadIdx.x] < mass), kBins - 1);
  return BracketAround(memory, mass, mass, fabsf(curve.spread[bin] - spread));
}

// A bracket that holds the `top_k`-th candidate: surely, if that takes not many.
template <int kRanks>
__device__ inline Bracket BracketOfCount(const RowMemory<kRanks>& memory, uint32_t top_k,
                                         int vocab) {
  if (vocab <= kMostGathered) return BracketOf(0.0f, kBins);
  const Curve& curve = memory.curve;
  const auto k = static_cast<float>(top_k);
  const float tops = curve.tops[threadIdx.x], others = curve.others[threadIdx.x];
  const int surely = __syncthreads_count(tops < k) + 1;
  if (surely <= kBins && curve.tops[surely - 1] + curve.others[surely - 1] <= kNotMany)
    return BracketOf(0.0f, static_cast<float>(surely));
  const float count = tops + others;
  const float margin = kDeviations * sqrtf(others + 1.0f);
  const int begin = __syncthreads_count(count + margin < k);
  const int end = __syncthreads_count(count - margin < k) + 1;
  return BracketOfBins(curve, static_cast<float>(begin), static_cast<float>(end));
}

}  // namespace moebius::kernels::cuda
