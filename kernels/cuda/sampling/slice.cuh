#pragma once

// A CTA's slice of a row of logits, a whole row if it is alone.
//
// A thread reads the same logits in every pass, so none waits for another: the first batches of the
// slice stay in shared memory, the last in registers until it has been weighed; those between are
// read again, from L2 as a rule.

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/sampling/weights.cuh"

namespace moebius::kernels::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTogether = 8;          // quads of four logits of a thread: a batch
constexpr int kHalf = kTogether / 2;  // quads that it loads at once, while it works on the others
constexpr int kBatch = 4 * kTogether * kThreads;
constexpr int kBatchBytes = kBatch * static_cast<int>(sizeof(float));
constexpr uint32_t kAllLanes = 0xffffffffu;

// The slice of this CTA.
struct Slice {
  const float* from;
  float4* kept;  // shared memory: [batches_kept][kTogether][kThreads]
  int count;
  int first_id;
  int batches_kept;  // if there are as many
  __device__ __forceinline__ int Batches() const { return (count + kBatch - 1) / kBatch; }
};

__host__ __device__ constexpr int SliceOf(int vocab, int ranks) {
  return ((vocab + ranks - 1) / ranks + 3) / 4 * 4;
}
__device__ __forceinline__ Slice MakeSlice(const float* row, int vocab, uint32_t rank, int ranks,
                                           float4* kept) {
  const int slice = SliceOf(vocab, ranks);
  const int begin = min(vocab, static_cast<int>(rank) * slice);
  const int count = min(vocab, begin + slice) - begin;
  const float* from = row + begin;
  asm("" : "+l"(from));  // or every loop would compute it anew
  return {from, kept, count, begin, 0};
}

// A thread's logits are numbered: 4 * kTogether a batch. Their places in the slice:
__device__ __forceinline__ int PlaceOf(int number) {
  return 4 * (number / 4 * kThreads + static_cast<int>(threadIdx.x)) + number % 4;
}

// `once`: what is not read again needs no room in L2. What lies beyond the slice is -infinity.
__device__ __forceinline__ float4 LoadVector(const float* from, bool once) {
  float4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(from), "l"(once ? kEvictFirst : kEvictNormal));
  return v;
}
// `whole`: all of it is in the slice. kVectors: the slice is 16-aligned, its count a multiple of 4;
// asked in the loops, the code for other slices would take room in the instruction cache.
template <bool kVectors>
__device__ __forceinline__ void LoadHalf(const Slice& slice, int batch, int half, bool once,
                                         bool whole, float4 (&quads)[kTogether]) {
  const float least = -__builtin_inff();
  const int first = PlaceOf(4 * (batch * kTogether + half * kHalf));
  const float* const from = slice.from + first;
  const int left = slice.count - first;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    float4& four = quads[half * kHalf + i];
    const float* const at = from + 4 * i * kThreads;
    if (whole && kVectors) {
      four = LoadVector(at, once);
      continue;
    }
    four = make_float4(least, least, least, least);
    if (kVectors) {
      if (4 * i * kThreads < left) four = LoadVector(at, once);
      continue;
    }
    if (4 * i * kThreads < left) four.x = __ldcg(at);
    if (4 * i * kThreads + 1 < left) four.y = __ldcg(at + 1);
    if (4 * i * kThreads + 2 < left) four.z = __ldcg(at + 2);
    if (4 * i * kThreads + 3 < left) four.w = __ldcg(at + 3);
  }
}
// One logit, or half of a batch, that may have been kept.
__device__ __forceinline__ float LogitOf(const Slice& slice, int number) {
  if (number >= 4 * slice.batches_kept * kTogether) return __ldcg(slice.from + PlaceOf(number));
  return reinterpret_cast<const float*>(
      slice.kept)[4 * (number / 4 * kThreads + static_cast<int>(threadIdx.x)) + number % 4];
}
template <bool kVectors>
__device__ __forceinline__ void HalfOf(const Slice& slice, int batch, int half, bool whole,
                                       float4 (&quads)[kTogether]) {
  if (batch >= slice.batches_kept)
    return LoadHalf<kVectors>(slice, batch, half, false, whole, quads);
#pragma unroll
  for (int i = half * kHalf; i < (half + 1) * kHalf; ++i)
    quads[i] = slice.kept[(batch * kTogether + i) * kThreads + static_cast<int>(threadIdx.x)];
}

}  // namespace moebius::kernels::cuda
