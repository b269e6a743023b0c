#pragma once

// A row of logits in the shared memory of a cluster of 8 CTAs, each a slice of it, and what the
// CTAs tell each other. Every reduction here is of integers or a maximum: exact, whatever the
// order.

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/sampling/weights.cuh"

namespace moebius::kernels::cuda {

constexpr int kRanks = 8;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPiece = 4 * kThreads;  // floats: a float4 a thread
constexpr int kMostPieces = 52;
// Pieces that one bulk copy brings: one thread takes some 150 cycles to start a copy.
constexpr int kPiecesOfCopy = 4;
constexpr int kMostCopies = kMostPieces / kPiecesOfCopy;
constexpr uint32_t kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int SliceOf(int vocab) {
  return ((vocab + kRanks - 1) / kRanks + 3) / 4 * 4;
}

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void StoreCluster(uint32_t address, uint64_t value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
}
__device__ __forceinline__ void StoreCluster(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint4 LoadCluster4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 LoadCluster2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address)
               : "memory");
  return v;
}

// What each CTA of a cluster tells all others: one value a rank.
struct Announced {
  uint64_t mass_one[kRanks];    // weights at temperature 1
  uint64_t mass[kRanks];        // at the row's temperature
  uint64_t mass_above[kRanks];  // of them, those before the bracket
  uint32_t largest[kRanks];     // OrderedBits
  uint32_t has_nan[kRanks];
  uint32_t first_largest[kRanks];  // id
  uint32_t listed[kRanks];         // candidates in the bracket
};

// The slice of this CTA.
struct Slice {
  float* data;  // [count rounded up to a multiple of 4], -infinity beyond count
  int quads;
  int first_id;
  int pieces;
};

// Starts loading; the slice may be read piece by piece after AwaitPiece. Includes a __syncthreads.
__device__ __forceinline__ Slice LoadSlice(const float* row, int vocab, uint32_t rank, bool aligned,
                                           float* data, uint64_t* barriers) {
  const int slice = SliceOf(vocab);
  const int begin = min(vocab, static_cast<int>(rank) * slice);
  const int count = min(vocab, begin + slice) - begin;
  Slice mine{data, (count + 3) / 4, begin, (count + kPiece - 1) / kPiece};
  const float* const from = row + begin;
  if (aligned) {
    const int whole = count / 4;  // quads
    if (threadIdx.x == 0) {
      constexpr int kQuads = kPiecesOfCopy * kThreads;
      const int copies = (mine.pieces + kPiecesOfCopy - 1) / kPiecesOfCopy;
      for (int c = 0; c < copies; ++c) BarrierInit(&barriers[c], 1);
      BarrierInitFence();
      for (int c = 0; c < copies; ++c) {
        const uint32_t bytes =
            static_cast<uint32_t>(min(kQuads, whole - c * kQuads)) * sizeof(float4);
        // Less than a quad comes by the loop below alone.
        BarrierArriveExpect(&barriers[c], bytes);
        if (bytes > 0) BulkLoad(data + 4 * c * kQuads, from + 4 * c * kQuads, bytes, &barriers[c]);
      }
    }
    if (threadIdx.x >= 32 && threadIdx.x < 36) {
      const int i = 4 * whole + static_cast<int>(threadIdx.x) - 32;
      if (i < 4 * mine.quads) data[i] = i < count ? from[i] : -__builtin_inff();
    }
  } else {
    for (int i = threadIdx.x; i < 4 * mine.quads; i += kThreads) {
      data[i] = i < count ? from[i] : -__builtin_inff();
    }
  }
  __syncthreads();
  return mine;
}
__device__ __forceinline__ void AwaitPiece(bool aligned, uint64_t* barriers, int piece) {
  if (aligned) BarrierWait(&barriers[piece / kPiecesOfCopy], 0);
}

// This thread's quad of a piece; -infinity beyond the slice.
__device__ __forceinline__ float4 QuadOf(const Slice& slice, int piece) {
  const int quad = piece * kThreads + static_cast<int>(threadIdx.x);
  const float least = -__builtin_inff();
  if (quad >= slice.quads) return make_float4(least, least, least, least);
  return reinterpret_cast<const float4*>(slice.data)[quad];
}

template <typename T>
__device__ __forceinline__ T WarpSum(T value) {
#pragma unroll
  for (int width = 16; width >= 1; width /= 2) value += __shfl_xor_sync(kAllLanes, value, width);
  return value;
}

}  // namespace moebius::kernels::cuda
