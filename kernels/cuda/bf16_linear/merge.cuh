#pragma once

// How the CTAs of a cluster, each with the sums of one segment of K, become one tile of the output.
// Two ways to the same sums, element by element ascending: large tiles stay where they are and are
// fetched; small ones, where latency counts, are sent to the CTA that adds them.

#include <cstdint>

#include "kernels/cuda/bf16_linear/output.cuh"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bf16.cuh"
#include "kernels/cuda/device/cluster.cuh"

namespace moebius::kernels::cuda {

// Puts a warp's 16 rows from `row0` of the tile on into exchange[token][row], rows kPitch apart.
template <int kTokens, int kPitch>
__device__ __forceinline__ void KeepForCluster(float* exchange, int row0,
                                               const float (&sums)[kTokens / 2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int row = row0 + lane / 4 + 8 * (i % 4 / 2);
    const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    exchange[token * kPitch + row] = sums[i];
  }
}

__device__ __forceinline__ float4 LoadClusterVector(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Four neighbouring rows of a token.
__device__ __forceinline__ void StoreFour(const Output& out, int row, int token,
                                          const float4& sum) {
  if (token >= out.m || row >= out.n) return;
  const int64_t to = token * out.stride + row;
  const float four[4] = {sum.x, sum.y, sum.z, sum.w};
  const bool whole = out.vectors && row + 4 <= out.n;
  if (out.f32) {
    float* const data = static_cast<float*>(out.data) + to;
    if (whole) {
      *reinterpret_cast<float4*>(data) = sum;
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (row + c < out.n) data[c] = four[c];
    }
  } else {
    uint16_t* const data = static_cast<uint16_t*>(out.data) + to;
    if (whole) {
      *reinterpret_cast<uint2*>(data) =
          make_uint2(RoundToBf16Pair(sum.x, sum.y), RoundToBf16Pair(sum.z, sum.w));
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (row + c < out.n) data[c] = RoundToBf16(four[c]);
    }
  }
}

__device__ __forceinline__ void Add(float4& sum, const float4& part) {
  sum.x = __fadd_rn(sum.x, part.x);
  sum.y = __fadd_rn(sum.y, part.y);
  sum.z = __fadd_rn(sum.z, part.z);
  sum.w = __fadd_rn(sum.w, part.w);
}

// Fetching. CTA `segment` of the cluster adds an equal part of the tile: element by element the
// sums of all segments, ascending. kThreads threads of each CTA take part, between two barriers of
// the cluster.
template <int kTokens, int kRows, int kPitch, int kThreads>
__device__ __forceinline__ void MergeSegments(const Output& out, const float* exchange, int segment,
                                              int segments, int row_of_tile, int token_of_tile) {
  const int share = kTokens * kRows / 4 / segments;  // in fours of rows
  const int begin = segment * share;
  for (int i = begin + static_cast<int>(threadIdx.x); i < begin + share; i += kThreads) {
    const int token = i / (kRows / 4), row = i % (kRows / 4) * 4;
    const uint32_t at = SharedAddress(exchange + token * kPitch + row);
    float4 sum = LoadClusterVector(ClusterAddress(at, 0));
#pragma unroll 4
    for (int s = 1; s < segments; ++s)
      Add(sum, LoadClusterVector(ClusterAddress(at, static_cast<uint32_t>(s))));
    StoreFour(out, row_of_tile + row, token_of_tile + token, sum);
  }
}

inline constexpr int kMostSegments = 8;

// Sending. A unit is four neighbouring accumulators of a thread, for eight tokens of a warp. The
// CTA of a segment adds the units of its share, equal parts in their order, which all CTAs send to
// received[segment of the sender][unit of the share]. What a thread needs to send and to add is an
// object made before the sums are there: made when they are, its addresses take hundreds of cycles.
template <int kTokens, int kSegments>
struct Shares {
  static constexpr int kUnits = 16 * kTokens;
  static constexpr int kSize = kUnits / kSegments;
  static constexpr int kBytes = 16 * kUnits;  // that a CTA receives
  static constexpr int kEights = kTokens / 8;

  // The units of 128 threads follow each other, every warp's turned by two more eights: all CTAs
  // send at once, and not all to the same one.
  static __device__ __forceinline__ int Unit(int eight, int thread) {
    return (eight + 2 * (thread / 32)) % kEights * 128 + thread;
  }
  static __device__ __forceinline__ int EightOf(int unit) {
    return (unit / 128 + 8 * kEights - 2 * (unit % 128 / 32)) % kEights;
  }
};

// A warpgroup of each CTA takes part. `arrived` expects kBytes; `received` is free in all CTAs.
template <int kTokens, int kSegments>
class SharesToSend {
 public:
  __device__ __forceinline__ SharesToSend(const float4* received, const uint64_t* arrived,
                                          int segment) {
    using S = Shares<kTokens, kSegments>;
#pragma unroll
    for (int j = 0; j < S::kEights; ++j) {
      const int unit = S::Unit(j, static_cast<int>(threadIdx.x));
      const auto owner = static_cast<uint32_t>(unit / S::kSize);
      const float4* const place = received + segment * S::kSize + unit % S::kSize;
      to_[j] = Kept(ClusterAddress(SharedAddress(place), owner));
      barrier_[j] = Kept(ClusterAddress(SharedAddress(arrived), owner));
    }
  }
  __device__ __forceinline__ void Send(const float (&sums)[kTokens / 2]) const {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float four[4] = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]};
      StoreAsync(to_[j], four, barrier_[j]);
    }
  }

 private:
  uint32_t to_[kTokens / 8], barrier_[kTokens / 8];
};

template <int kTokens, int kSegments>
class ShareToAdd {
 public:
  __device__ __forceinline__ ShareToAdd(const Output& out, const float4* received, int segment,
                                        int row_of_tile, int token_of_tile)
      : received_(received + threadIdx.x) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int unit = segment * S::kSize + round * 128 + static_cast<int>(threadIdx.x);
      const int thread = unit % 128;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = row_of_tile + thread / 32 * 16 + thread % 32 / 4 + 8 * (c / 2);
        const int token = token_of_tile + S::EightOf(unit) * 8 + 2 * (thread % 4) + c % 2;
        const int64_t at = (token * out.stride + row) * (out.f32 ? 4 : 2);
        uint8_t* const data = static_cast<uint8_t*>(out.data) + at;
        to_[round][c] = Kept(row < out.n && token < out.m ? data : nullptr);
      }
    }
  }
  // Waits for the share and stores it, element by element the sum of all segments, ascending.
  __device__ __forceinline__ void Add(uint64_t* arrived, bool f32) const {
    BarrierWaitForCluster(arrived, 0);
    if (S::kSize < 128 && threadIdx.x >= S::kSize) return;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      // All loads on their way before the first is added.
      float4 parts[kSegments];
#pragma unroll
      for (int s = 0; s < kSegments; ++s) parts[s] = received_[s * S::kSize + round * 128];
      float4 sum = parts[0];
#pragma unroll
      for (int s = 1; s < kSegments; ++s) cuda::Add(sum, parts[s]);
      const float four[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (to_[round][c] == nullptr) continue;
        if (f32) {
          *reinterpret_cast<float*>(to_[round][c]) = four[c];
        } else {
          *reinterpret_cast<uint16_t*>(to_[round][c]) = RoundToBf16(four[c]);
        }
      }
    }
  }

 private:
  using S = Shares<kTokens, kSegments>;
  static constexpr int kRounds = (S::kSize + 127) / 128;

  const float4* received_;
  uint8_t* to_[kRounds][4];  // where the sums of a unit go; nullptr: nowhere
};

}  // namespace moebius::kernels::cuda
