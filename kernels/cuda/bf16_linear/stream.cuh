#pragma once

// The product as a stream: a persistent grid whose CTAs load stages of 64 of K into a ring, across
// the borders of tiles, and multiply them as they come. All products by head, and single ones whose
// segments of K are long or whose rows are many; the others: resident.cuh.

#include <cstdint>

#include "kernels/cuda/bf16_linear/merge.cuh"
#include "kernels/cuda/bf16_linear/output.cuh"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/wgmma.cuh"

namespace moebius::kernels::cuda {

inline constexpr int kBlock = 64;  // of K: 128 bytes, a swizzled row

struct StreamShape {
  int n_tiles, m_tiles, heads;
  int k_blocks;
  int segments;     // the CTAs of a cluster
  int x_head_cols;  // between heads: columns of x
  int weight_head_rows;
  uint64_t weights_policy;  // of L2
  Output out;
};

// A tile of weights (kGroups warpgroups of kSubs times 64 rows each) by tokens, and its stages in
// shared memory. Two CTAs share a multiprocessor where the kernel is short: one loads while the
// other ends, be it one of the stream's next kernel, and clusters find room.
template <int kTokensOfTile, int kGroupsOfTile, int kSubsOfTile, int kCtasOfMultiprocessor,
          bool kTransposedWeights, bool kBulkOutput>
struct Tile {
  static constexpr int kTokens = kTokensOfTile;
  static constexpr int kGroups = kGroupsOfTile;
  static constexpr int kSubs = kSubsOfTile;
  static constexpr bool kTransposed = kTransposedWeights;
  static constexpr int kCtas = kCtasOfMultiprocessor;
  static constexpr int kRows = 64 * kGroups * kSubs;
  static constexpr int kWeightBytes = kRows * 128;
  static constexpr int kStageBytes = kWeightBytes + kTokens * 128;
  static constexpr int kThreads = 128 * kGroups;  // and a warp that loads
  // Many outputs at once may go through shared memory to the copy engine.
  static constexpr bool kBulk = kBulkOutput && kTokens >= 32;
  static constexpr int kPieces = 4;
  static constexpr int kOutBytes = kBulk ? kGroups * kPieces * kPieceBytes : 0;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kMostStages =
      ((kCtas == 1 ? 227 : 113) * 1024 - kBarrierBytes - kOutBytes) / kStageBytes;
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;
  static constexpr int kBytes = kStages * kStageBytes + kOutBytes + kBarrierBytes;
  // Segments meet in the stages' memory as [token][row], padded so that a warp's writes spread over
  // all banks.
  static constexpr int kPitch = kRows + 4;
  static_assert(kTokens * kPitch * 4 <= kStages * kStageBytes, "the sums of a segment fit");
};

// Where the loading warp and the multiplying warps are in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Place {
  int head, row0, token0;
};
// Tiles that share weights are neighbours: their weights are read from memory once.
template <typename T>
__device__ Place PlaceOf(const StreamShape& shape, int tile) {
  const int rest = tile / shape.m_tiles;
  return {rest / shape.n_tiles, rest % shape.n_tiles * T::kRows, tile % shape.m_tiles * T::kTokens};
}

template <typename T>
__device__ void LoadWeights(uint8_t* stage, const CUtensorMap* weights, uint64_t* full,
                            const StreamShape& shape, const Place& place, int block) {
  const int head_row = place.head * shape.weight_head_rows;
  if constexpr (T::kTransposed) {
#pragma unroll
    for (int group = 0; group < T::kRows / 64; ++group) {
      TmaLoad2d(stage + group * 64 * 128, weights, full, place.row0 + 64 * group,
                head_row + block * kBlock, shape.weights_policy);
    }
  } else {
    TmaLoad2d(stage, weights, full, block * kBlock, head_row + place.row0, shape.weights_policy);
  }
}

// One lane keeps the ring full. Weights are constants: the first stages' are on their way before
// the stream's preceding kernel has written the rows.
template <typename T>
__device__ void Load(uint8_t* stages, uint64_t* full, uint64_t* empty, const CUtensorMap* weights,
                     const CUtensorMap* tokens, const StreamShape& shape, int block0, int blocks) {
  const int tiles = shape.n_tiles * shape.m_tiles * shape.heads;
  const int first = static_cast<int>(blockIdx.x) / shape.segments;
  const int stride = static_cast<int>(gridDim.x) / shape.segments;
  PrefetchTensorMap(weights);
  PrefetchTensorMap(tokens);
  const auto load_tokens = [&](const Place& place, int block, int stage) {
    TmaLoad2d(stages + stage * T::kStageBytes + T::kWeightBytes, tokens, &full[stage],
              place.head * shape.x_head_cols + block * kBlock, place.token0, kEvictLast);
  };
  const auto load_weights = [&](const Place& place, int block, int stage) {
    BarrierArriveExpect(&full[stage], T::kStageBytes);
    LoadWeights<T>(stages + stage * T::kStageBytes, weights, &full[stage], shape, place, block);
  };
  // The first round of the ring, weights of all stages first.
  int begun = 0;
  for (int tile = first; tile < tiles && begun < T::kStages; tile += stride) {
    const Place place = PlaceOf<T>(shape, tile);
    for (int block = block0; block < block0 + blocks && begun < T::kStages; ++block, ++begun)
      load_weights(place, block, begun);
  }
  WaitForPrecedingKernel();
  int loaded = 0;
  Ring<T::kStages> ring;
  for (int tile = first; tile < tiles; tile += stride) {
    const Place place = PlaceOf<T>(shape, tile);
    for (int block = block0; block < block0 + blocks; ++block, ++loaded) {
      if (loaded >= T::kStages) {
        BarrierWait(&empty[ring.stage], ring.phase ^ 1);
        load_weights(place, block, ring.stage);
      }
      load_tokens(place, block, ring.stage);
      ring.Advance();
    }
  }
}

template <typename T>
__device__ void MultiplyBlock(float (&sums)[T::kSubs][T::kTokens / 2], uint32_t stage, int group,
                              bool first) {
  using Instruction = WgmmaInstruction<Bf16Operands, T::kTokens>;
  const uint32_t weights = stage + group * T::kSubs * 64 * 128;
  const uint64_t a = T::kTransposed ? MnMajorDescriptor(weights, 8192) : KMajorDescriptor(weights);
  const uint64_t b = KMajorDescriptor(stage + T::kWeightBytes);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kBlock / 16; ++step) {
    const uint64_t step_b = AdvanceDescriptor(b, 32 * step);
#pragma unroll
    for (int sub = 0; sub < T::kSubs; ++sub) {
      const bool add = !first || step != 0;
      if constexpr (T::kTransposed) {
        Instruction::SharedTransposedA(
            sums[sub], AdvanceDescriptor(a, sub * 64 * 128 + 2048 * step), step_b, add);
      } else {
        Instruction::Shared(sums[sub], AdvanceDescriptor(a, sub * 64 * 128 + 32 * step), step_b,
                            add);
      }
    }
  }
  WgmmaCommit();
}

// One CTA of a cluster of `segments`: warpgroups 0 .. kGroups - 1 multiply, one warp more loads.
template <typename T>
__global__ void __launch_bounds__(T::kThreads + 32, T::kCtas)
    Bf16LinearStream(const __grid_constant__ CUtensorMap weights,
                     const __grid_constant__ CUtensorMap tokens,
                     const __grid_constant__ CUtensorMap out, const StreamShape shape) {
  extern __shared__ __align__(1024) uint8_t stages[];
  uint8_t* const outgoing = stages + T::kStages * T::kStageBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(outgoing + T::kOutBytes);
  uint64_t* const empty = full + T::kStages;
  // The shuffle tells the compiler that a warp agrees; without it it serialises the wgmma.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int segment = static_cast<int>(blockIdx.x) % shape.segments;
  const int block0 = segment * shape.k_blocks / shape.segments;
  const int blocks = (segment + 1) * shape.k_blocks / shape.segments - block0;
  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      BarrierInit(&full[s], 1);
      BarrierInit(&empty[s], 4 * T::kGroups);
    }
    BarrierInitFence();
  }
  __syncthreads();
  LetNextKernelStart();
  if (warp == 4 * T::kGroups) {
    if (lane == 0) Load<T>(stages, full, empty, &weights, &tokens, shape, block0, blocks);
    return;
  }

  const int group = warp / 4;
  const int tiles = shape.n_tiles * shape.m_tiles * shape.heads;
  const int stride = static_cast<int>(gridDim.x) / shape.segments;
  Ring<T::kStages> ring;
  for (int tile = static_cast<int>(blockIdx.x) / shape.segments; tile < tiles; tile += stride) {
    const Place place = PlaceOf<T>(shape, tile);
    // The first step of a chain overwrites them; zeros keep the compiler from serialising the
    // wgmma.
    float sums[T::kSubs][T::kTokens / 2] = {};
    int last = 0;
    for (int block = 0; block < blocks; ++block) {
      BarrierWait(&full[ring.stage], ring.phase);
      MultiplyBlock<T>(sums, SharedAddress(stages + ring.stage * T::kStageBytes), group,
                       block == 0);
      WgmmaWait<1>();
      if (block > 0 && lane == 0) BarrierArrive(&empty[last]);
      last = ring.stage;
      ring.Advance();
    }
    WgmmaWait<0>();
    if (lane == 0) BarrierArrive(&empty[last]);
#pragma unroll
    for (int sub = 0; sub < T::kSubs; ++sub) KeepRegisters(sums[sub]);
    WaitForPrecedingKernel();  // it may still read what `out` held
    if (shape.segments == 1) {
      const int row0 = place.row0 + group * T::kSubs * 64;
      if constexpr (T::kBulk) {
        if (shape.out.bulk) {
          uint8_t* const pieces = outgoing + group * T::kPieces * kPieceBytes;
          const int column0 = place.head * static_cast<int>(shape.out.head_stride) + row0;
          if (shape.out.f32) {
            StoreSumsInBulk<T::kTokens, T::kSubs, T::kPieces, true>(&out, pieces, 2 + group,
                                                                    column0, place.token0, sums);
          } else {
            StoreSumsInBulk<T::kTokens, T::kSubs, T::kPieces, false>(&out, pieces, 2 + group,
                                                                     column0, place.token0, sums);
          }
          continue;
        }
      }
#pragma unroll
      for (int sub = 0; sub < T::kSubs; ++sub) {
        StoreSums<T::kTokens>(shape.out, place.head, row0 + 64 * sub + 16 * (warp % 4),
                              place.token0, sums[sub]);
      }
    } else {
      float* const exchange = reinterpret_cast<float*>(stages);
      NamedBarrier(1, T::kThreads);  // nobody reads the last stages any more
#pragma unroll
      for (int sub = 0; sub < T::kSubs; ++sub) {
        KeepForCluster<T::kTokens, T::kPitch>(
            exchange, (group * T::kSubs + sub) * 64 + 16 * (warp % 4), sums[sub]);
      }
      ClusterBarrier();
      MergeSegments<T::kTokens, T::kRows, T::kPitch, T::kThreads>(
          shape.out, exchange, segment, shape.segments, place.row0, place.token0);
      ClusterBarrier();  // and only now may the others' memory go
    }
  }
  if constexpr (T::kBulk) FinishBulkStores();
}

}  // namespace moebius::kernels::cuda
