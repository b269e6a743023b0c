#pragma once

// The product of a narrow matrix (the gate): a segment of K lies in shared memory whole. Latency is
// all that counts there. Weights are on their way before the stream's preceding kernel has ended,
// all token rows once it has, and the chain of wgmma waits for nothing but them. The CTAs of a
// cluster hold a segment each and send their sums to each other (merge.cuh).

#include <cstdint>

#include "kernels/cuda/bf16_linear/merge.cuh"
#include "kernels/cuda/bf16_linear/output.cuh"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/wgmma.cuh"

namespace moebius::kernels::cuda {

struct ResidentShape {
  int m_tiles;
  int k_blocks;  // of 64
  Output out;
};

// 64 rows of the weight by kTokens token rows, in the CTAs of kSegments segments.
template <int kTokensOfTile, int kSegmentsOfTile>
struct ResidentTile {
  static constexpr int kTokens = kTokensOfTile;
  static constexpr int kSegments = kSegmentsOfTile;
  using Share = Shares<kTokens, kSegments>;
  static constexpr int kRows = 64;
  static constexpr int kMostBlocks = 14;  // of K, in a segment
  static constexpr int kWeightBytes = kRows * 128;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kThreads = 128;  // and a warp that loads
  // Sums arrive where weights were, those of the first blocks. (K is cut only where a segment keeps
  // four of them, Bf16LinearSegments.)
  static constexpr int kReusedBlocks = (Share::kBytes + kWeightBytes - 1) / kWeightBytes;
  static_assert(kReusedBlocks < 4, "every segment has more blocks");
  static constexpr int kBytes = kMostBlocks * (kWeightBytes + kTokenBytes) + 1024;
};

// The chain of a segment's blocks, each as soon as it is there.
template <typename T>
__device__ __forceinline__ void MultiplySegment(float (&sums)[T::kTokens / 2],
                                                const uint8_t* weight_blocks,
                                                const uint8_t* token_blocks, uint64_t* full,
                                                int blocks) {
  uint64_t a = KMajorDescriptor(SharedAddress(weight_blocks));
  uint64_t b = KMajorDescriptor(SharedAddress(token_blocks));
  for (int block = 0; block < blocks; ++block) {
    BarrierWait(&full[block], 0);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      WgmmaInstruction<Bf16Operands, T::kTokens>::Shared(sums, AdvanceDescriptor(a, 32 * step),
                                                         AdvanceDescriptor(b, 32 * step),
                                                         block != 0 || step != 0);
    }
    WgmmaCommit();
    a = AdvanceDescriptor(a, T::kWeightBytes);
    b = AdvanceDescriptor(b, T::kTokenBytes);
    if (block == T::kReusedBlocks && T::kSegments > 1) {
      WgmmaWait<1>();
      ClusterArriveRelaxed();  // sums may come: what they overwrite has been read
    }
  }
  WgmmaWait<0>();
  KeepRegisters(sums);
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads + 32, 1)
    Bf16LinearResident(const __grid_constant__ CUtensorMap weights,
                       const __grid_constant__ CUtensorMap tokens, const ResidentShape shape) {
  extern __shared__ __align__(1024) uint8_t weight_blocks[];
  uint8_t* const token_blocks = weight_blocks + T::kMostBlocks * T::kWeightBytes;
  uint64_t* const full =
      reinterpret_cast<uint64_t*>(token_blocks + T::kMostBlocks * T::kTokenBytes);
  uint64_t* const arrived = full + T::kMostBlocks;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  constexpr int kSegments = T::kSegments;
  const int segment = static_cast<int>(blockIdx.x) % kSegments;
  const int tile = static_cast<int>(blockIdx.x) / kSegments;
  const int row0 = tile / shape.m_tiles * T::kRows, token0 = tile % shape.m_tiles * T::kTokens;
  const int block0 = segment * shape.k_blocks / kSegments;
  const int blocks = (segment + 1) * shape.k_blocks / kSegments - block0;

  if (threadIdx.x == 0) {
    for (int b = 0; b < T::kMostBlocks; ++b) BarrierInit(&full[b], 1);
    BarrierInit(arrived, 1);
    BarrierInitFence();
    BarrierArriveExpect(arrived, T::Share::kBytes);
  }
  __syncthreads();
  if (warp == T::kThreads / 32) {
    if (lane != 0) return;
    // Weights that other tiles read again stay in L2.
    const uint64_t policy = shape.m_tiles == 1 ? kEvictFirst : kEvictNormal;
    for (int b = 0; b < blocks; ++b) {
      BarrierArriveExpect(&full[b], T::kWeightBytes + T::kTokenBytes);
      TmaLoad2d(weight_blocks + b * T::kWeightBytes, &weights, &full[b], 64 * (block0 + b), row0,
                policy);
    }
    WaitForPrecedingKernel();
    LetNextKernelStart();  // at the start it cost 0.3 us with 64 tokens, and won nothing
    for (int b = 0; b < blocks; ++b) {
      TmaLoad2d(token_blocks + b * T::kTokenBytes, &tokens, &full[b], 64 * (block0 + b), token0,
                kEvictLast);
    }
    return;
  }

  // The first step overwrites them; zeros keep the compiler from serialising the wgmma.
  float sums[T::kTokens / 2] = {};
  if constexpr (kSegments == 1) {
    MultiplySegment<T>(sums, weight_blocks, token_blocks, full, blocks);
    WaitForPrecedingKernel();  // it may still read what `out` held
    StoreSums<T::kTokens>(shape.out, 0, row0 + 16 * warp, token0, sums);
  } else {
    float4* const received = reinterpret_cast<float4*>(weight_blocks);
    const SharesToSend<T::kTokens, kSegments> outgoing(received, arrived, segment);
    const ShareToAdd<T::kTokens, kSegments> incoming(shape.out, received, segment, row0, token0);
    MultiplySegment<T>(sums, weight_blocks, token_blocks, full, blocks);
    WaitForPrecedingKernel();  // as above
    ClusterWait();
    outgoing.Send(sums);
    incoming.Add(arrived, shape.out.f32);
  }
}

}  // namespace moebius::kernels::cuda
