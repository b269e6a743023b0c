#pragma once

// What the CTAs of a cluster, or one CTA alone, tell each other of the row that they hold. Every
// reduction here is of integers or a maximum: exact, whatever the order and the number of CTAs; but
// for sums of floats, which serve guesses.

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/sampling/slice.cuh"

namespace moebius::kernels::cuda {

// The CTAs that hold a row.
template <int kRanks>
__device__ __forceinline__ uint32_t RankOfCta() {
  uint32_t rank = 0;
  if (kRanks > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
template <int kRanks>
__device__ __forceinline__ void RowBarrier() {
  if (kRanks > 1) {
    ClusterBarrier();
  } else {
    __syncthreads();
  }
}
// Stores to, adds to, lowers and loads what lies at `at` in the shared memory of CTA `rank`.
template <int kRanks>
__device__ __forceinline__ void StoreAt(uint64_t* at, uint32_t rank, uint64_t value) {
  if (kRanks == 1) {
    *at = value;
    return;
  }
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(ClusterAddress(SharedAddress(at), rank)),
               "l"(value)
               : "memory");
}
template <int kRanks>
__device__ __forceinline__ uint32_t AddAt(uint32_t* at, uint32_t rank, uint32_t value) {
  if (kRanks == 1) return atomicAdd(at, value);
  uint32_t before;
  asm volatile("atom.relaxed.cluster.shared::cluster.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(ClusterAddress(SharedAddress(at), rank)), "r"(value)
               : "memory");
  return before;
}
template <int kRanks>
__device__ __forceinline__ void MinAt(uint32_t* at, uint32_t rank, uint32_t value) {
  if (kRanks == 1) {
    atomicMin(at, value);
    return;
  }
  asm volatile("red.relaxed.cluster.shared::cluster.min.u32 [%0], %1;" ::"r"(
                   ClusterAddress(SharedAddress(at), rank)),
               "r"(value)
               : "memory");
}
template <int kRanks>
__device__ __forceinline__ uint32_t LoadAt(const uint32_t* at, uint32_t rank) {
  if (kRanks == 1) return *at;
  uint32_t v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(v)
               : "r"(ClusterAddress(SharedAddress(at), rank))
               : "memory");
  return v;
}
template <int kRanks>
__device__ __forceinline__ uint4 LoadAt(const uint4* at, uint32_t rank) {
  if (kRanks == 1) return *at;
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(ClusterAddress(SharedAddress(at), rank))
               : "memory");
  return v;
}

// Sums or extremes over a row, known to all threads.
enum class Fold { kSum, kMax };
constexpr int kMostExchanged = 4;
template <int kRanks>
struct ExchangeMemory {
  uint64_t of_warp[kMostExchanged][kWarps];
  // Two that take turns: a CTA may send anew while another still reads.
  uint64_t of_rank[2][kMostExchanged][kRanks];
};

template <Fold kFold>
__device__ __forceinline__ uint64_t FoldTwo(uint64_t x, uint64_t y) {
  if (kFold == Fold::kSum) return x + y;
  return x < y ? y : x;
}
// Over groups of kWidth lanes.
template <Fold kFold, int kWidth>
__device__ __forceinline__ uint64_t FoldLanes(uint64_t value) {
#pragma unroll
  for (int width = kWidth / 2; width >= 1; width /= 2)
    value = FoldTwo<kFold>(value, __shfl_xor_sync(kAllLanes, value, width));
  return value;
}

// Over a warp: values below 2^51, maxima of values below 2^32.
template <Fold kFold>
__device__ __forceinline__ uint64_t FoldWarp(uint64_t value) {
  if (kFold == Fold::kSum) {
    const uint32_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value) & 0xffffffu);
    const uint32_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value >> 24));
    return (static_cast<uint64_t>(high) << 24) + low;
  }
  return __reduce_max_sync(kAllLanes, static_cast<uint32_t>(value));
}

// Replaces each of `values` (as FoldWarp takes them) by its fold over all threads of the row's
// CTAs. All threads call it; `turn` counts the calls. What threads wrote to shared memory before is
// visible after it.
template <Fold... kFolds, int kRanks>
__device__ __forceinline__ void Exchange(ExchangeMemory<kRanks>& memory, uint32_t rank, int& turn,
                                         uint64_t (&values)[sizeof...(kFolds)]) {
  static_assert(sizeof...(kFolds) <= kMostExchanged && kWarps == 16);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  turn ^= 1;
  const auto fold_warp = [&]<Fold kFold>(int i) {
    const uint64_t value = FoldWarp<kFold>(values[i]);
    if (lane == 0) memory.of_warp[i][warp] = value;
  };
  int i = 0;
  (fold_warp.template operator()<kFolds>(i++), ...);
  __syncthreads();
  const auto fold_cta = [&]<Fold kFold>(int of) {
    if (warp != of) return;
    const uint64_t value = FoldLanes<kFold, 16>(memory.of_warp[of][lane % 16]);
    if (lane < kRanks)
      StoreAt<kRanks>(&memory.of_rank[turn][of][rank], static_cast<uint32_t>(lane), value);
  };
  i = 0;
  (fold_cta.template operator()<kFolds>(i++), ...);
  RowBarrier<kRanks>();
  const auto fold_row = [&]<Fold kFold>(int of) {
    values[of] = memory.of_rank[turn][of][0];
#pragma unroll 1
    for (int r = 1; r < kRanks; ++r)
      values[of] = FoldTwo<kFold>(values[of], memory.of_rank[turn][of][r]);
  };
  i = 0;
  (fold_row.template operator()<kFolds>(i++), ...);
}

// The sum of any values over a warp.
__device__ __forceinline__ uint64_t AddWarp(uint64_t value) {
  constexpr uint32_t kMask = 0xffffffu;
  const uint32_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value) & kMask);
  const uint32_t middle = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value >> 24) & kMask);
  const uint32_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value >> 48));
  return (static_cast<uint64_t>(high) << 48) + (static_cast<uint64_t>(middle) << 24) + low;
}
// Inclusive sums over a warp.
template <typename T>
__device__ __forceinline__ void ScanWarp(T& value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T lower = __shfl_up_sync(kAllLanes, value, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) value += lower;
  }
}

// Inclusive sums of kCount values over the threads of the CTA. `scratch` may be used again after a
// __syncthreads.
template <int kCount>
__device__ __forceinline__ void InclusiveScan(float (&values)[kCount],
                                              float (&scratch)[kCount][kWarps]) {
  static_assert(kCount <= kWarps && kWarps == 16);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    ScanWarp(values[i]);
    if (lane == 31) scratch[i][warp] = values[i];
  }
  __syncthreads();
  if (warp < kCount) {
    float of_warps = lane < kWarps ? scratch[warp][lane] : 0.0f;
    ScanWarp(of_warps);
    const float before = __shfl_up_sync(kAllLanes, of_warps, 1);
    if (lane < kWarps) scratch[warp][lane] = lane == 0 ? 0.0f : before;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] += scratch[i][warp];
}

}  // namespace moebius::kernels::cuda
