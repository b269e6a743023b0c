#pragma once

// How the CTAs of a cluster, each with the sums of one segment of K, become one tile of the output.
// Two ways to the same sums, element by element ascending: large tiles stay where they are and are
// fetched; small ones, where latency counts, are sent to the CTA that adds them.

#include <cstdint>

#include "kernels/cuda/bf16_linear/output.cuh"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bf16.cuh"

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
    for (int s = 1; s < segments; ++s) {
      const float4 part = LoadClusterVector(ClusterAddress(at, static_cast<uint32_t>(s)));
      sum.x = __fadd_rn(sum.x, part.x);
      sum.y = __fadd_rn(sum.y, part.y);
      sum.z = __fadd_rn(sum.z, part.z);
      sum.w = __fadd_rn(sum.w, part.w);
    }
    const int to_row = row_of_tile + row, to_token = token_of_tile + token;
    if (to_token >= out.m || to_row >= out.n) continue;
    const int64_t to = to_token * out.stride + to_row;
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
    const bool whole = out.vectors && to_row + 4 <= out.n;
    if (out.f32) {
      float* const data = static_cast<float*>(out.data) + to;
      if (whole) {
        *reinterpret_cast<float4*>(data) = sum;
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (to_row + c < out.n) data[c] = four[c];
      }
    } else {
      uint16_t* const data = static_cast<uint16_t*>(out.data) + to;
      if (whole) {
        *reinterpret_cast<uint2*>(data) =
            make_uint2(RoundToBf16Pair(sum.x, sum.y), RoundToBf16Pair(sum.z, sum.w));
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (to_row + c < out.n) data[c] = RoundToBf16(four[c]);
      }
    }
  }
}

// Orders no memory: what a CTA needs to know of the others' is that their barriers exist
// (BarrierInitFence).
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Writes to the memory of another CTA of the cluster and counts the bytes on its `barrier` (both
// addresses from ClusterAddress).
__device__ __forceinline__ void SendToCluster(uint32_t address, const float* v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

// Sending. A unit is four neighbouring accumulators of a thread; unit u = 128 j + thread holds the
// j-th four. CTA `segment` adds the units of its share, [segment * share, (segment + 1) * share),
// that all segments sent to received[segment][unit of the share].
template <int kTokens>
__device__ __forceinline__ int UnitsOfShare(int segments) {
  return kTokens / 8 * 128 / segments;
}
// A warpgroup of each CTA takes part. `arrived` expects the bytes of all segments' shares; all CTAs
// of the cluster have begun.
template <int kTokens>
__device__ __forceinline__ void SendShares(float4* received, uint64_t* arrived, int segment,
                                           int segments, const float (&sums)[kTokens / 2]) {
  const int share = UnitsOfShare<kTokens>(segments);
  const uint32_t to = SharedAddress(received), barrier = SharedAddress(arrived);
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const int unit = 128 * j + static_cast<int>(threadIdx.x);
    const auto owner = static_cast<uint32_t>(unit / share);
    SendToCluster(ClusterAddress(to + (segment * share + unit % share) * 16, owner), sums + 4 * j,
                  ClusterAddress(barrier, owner));
  }
}
template <int kTokens>
__device__ __forceinline__ void AddShares(const Output& out, const float4* received,
                                          uint64_t* arrived, int segment, int segments,
                                          int row_of_tile, int token_of_tile) {
  const int share = UnitsOfShare<kTokens>(segments);
  BarrierWait(arrived, 0);
  for (int i = static_cast<int>(threadIdx.x); i < share; i += 128) {
    float4 sum = received[i];
#pragma unroll 8
    for (int s = 1; s < segments; ++s) {
      const float4 part = received[s * share + i];
      sum.x = __fadd_rn(sum.x, part.x);
      sum.y = __fadd_rn(sum.y, part.y);
      sum.z = __fadd_rn(sum.z, part.z);
      sum.w = __fadd_rn(sum.w, part.w);
    }
    const int unit = segment * share + i, thread = unit % 128;
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = row_of_tile + thread / 32 * 16 + thread % 32 / 4 + 8 * (c / 2);
      const int token = token_of_tile + unit / 128 * 8 + 2 * (thread % 4) + c % 2;
      if (row >= out.n || token >= out.m) continue;
      const int64_t to = token * out.stride + row;
      if (out.f32) {
        static_cast<float*>(out.data)[to] = four[c];
      } else {
        static_cast<uint16_t*>(out.data)[to] = RoundToBf16(four[c]);
      }
    }
  }
}

}  // namespace moebius::kernels::cuda
