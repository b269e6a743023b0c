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

// Sending. A unit is four neighbouring accumulators of a thread; unit 128 j + thread holds its j-th
// four. CTA `segment` of 2^log_segments adds the units of its share, equal parts in their order,
// which all CTAs send to received[segment of the sender][unit of the share].
template <int kTokens>
struct Shares {
  static constexpr int kUnits = 16 * kTokens;
  static constexpr int kBytes = 16 * kUnits;  // that a CTA receives
  int log_segments;

  __device__ __forceinline__ int LogSize() const {
    static_assert(kTokens == 8 || kTokens == 16 || kTokens == 32 || kTokens == 64, "a power of 2");
    constexpr int kLogUnits = kTokens == 8 ? 7 : kTokens == 16 ? 8 : kTokens == 32 ? 9 : 10;
    return kLogUnits - log_segments;
  }
  __device__ __forceinline__ int Size() const { return 1 << LogSize(); }
};

// A warpgroup of each CTA takes part. `arrived` expects kBytes; `received` is free in all CTAs.
template <int kTokens>
__device__ __forceinline__ void SendShares(const Shares<kTokens>& shares, const float4* received,
                                           const uint64_t* arrived, int segment,
                                           const float (&sums)[kTokens / 2]) {
  const uint32_t to = SharedAddress(received), barrier = SharedAddress(arrived);
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const int unit = 128 * j + static_cast<int>(threadIdx.x);
    const auto owner = static_cast<uint32_t>(unit >> shares.LogSize());
    const int place = segment * shares.Size() + (unit & (shares.Size() - 1));
    const float four[4] = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]};
    StoreAsync(ClusterAddress(to + place * 16, owner), four, ClusterAddress(barrier, owner));
  }
}

// Where in the output the sums of a unit go: elements, or less than zero for none.
struct UnitPlaces {
  int64_t at[4];
};
__device__ __forceinline__ UnitPlaces PlacesOfUnit(const Output& out, int unit, int row_of_tile,
                                                   int token_of_tile) {
  const int thread = unit % 128;
  UnitPlaces places;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int row = row_of_tile + thread / 32 * 16 + thread % 32 / 4 + 8 * (c / 2);
    const int token = token_of_tile + unit / 128 * 8 + 2 * (thread % 4) + c % 2;
    places.at[c] = row < out.n && token < out.m ? token * out.stride + row : -1;
  }
  return places;
}

// Waits for a share and adds it, element by element the sums of all segments, ascending.
template <int kTokens>
__device__ __forceinline__ void AddShares(const Shares<kTokens>& shares, const Output& out,
                                          const float4* received, uint64_t* arrived, int segment,
                                          int row_of_tile, int token_of_tile) {
  const int share = shares.Size(), segments = 1 << shares.log_segments;
  int i = static_cast<int>(threadIdx.x);
  UnitPlaces places = PlacesOfUnit(out, segment * share + i, row_of_tile, token_of_tile);
  BarrierWaitForCluster(arrived, 0);
  while (i < share) {
    // All loads on their way before the first is added.
    float4 parts[kMostSegments];
#pragma unroll
    for (int s = 0; s < kMostSegments; ++s)
      if (s < segments) parts[s] = received[s * share + i];
    float4 sum = parts[0];
#pragma unroll
    for (int s = 1; s < kMostSegments; ++s)
      if (s < segments) Add(sum, parts[s]);
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (places.at[c] < 0) continue;
      if (out.f32) {
        static_cast<float*>(out.data)[places.at[c]] = four[c];
      } else {
        static_cast<uint16_t*>(out.data)[places.at[c]] = RoundToBf16(four[c]);
      }
    }
    i += 128;
    places = PlacesOfUnit(out, segment * share + i, row_of_tile, token_of_tile);
  }
}

}  // namespace moebius::kernels::cuda
