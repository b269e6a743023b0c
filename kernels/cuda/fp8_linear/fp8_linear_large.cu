#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bulk_store.cuh"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/store_matrix.cuh"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/fp8_linear/output.cuh"
#include "kernels/cuda/fp8_linear/paths.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int kSharedBytes =
    226 * 1024;  // dynamic shared memory of the one CTA of a multiprocessor

struct Large {
  int m, n, k_blocks;
  int segments, segment_blocks;
  int token_tiles;  // rounded up to whole clusters
  int weight_tiles;
  int band;  // clusters of token tiles that share weight tiles in L2
  const float* x_scales;
  const float* weight_scales;
};

// Token rows (64 a warpgroup and half) and weight rows of a tile.
template <int kWeights, int kHalves, bool kSegmented>
struct LargeTile {
  static constexpr int kTokens = 128 * kHalves;
  static constexpr int kWeightRows = kWeights;
  static constexpr int kTokenBytes = kTokens * kFp8Block;
  static constexpr int kWeightBytes = kWeights * kFp8Block;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kOutBytes = kTokens * kWeights * 2;
  // The sums of earlier segments, in float32, lie where output rows are staged afterwards.
  static constexpr int kStagedBytes = kSegmented ? 2 * kOutBytes : kOutBytes;
  static constexpr int kMostStages = (kSharedBytes - 1024 - kStagedBytes) / kStageBytes;
  static constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
  static constexpr int kBytes = 1024 + kStages * kStageBytes + kStagedBytes;
  static constexpr int kColumns = kWeights / 2;  // accumulators of a thread and half
  // Output leaves in boxes of 64 rows and 64 columns, swizzled.
  static constexpr int kBoxes = kWeights / 64;
  static constexpr int kBoxBytes = 64 * 64 * 2;
  static_assert(kWeights % 64 == 0, "whole boxes");
  static_assert(kHalves == 1 || !kSegmented, "totals of one half");
  static_assert(kStages >= 3, "a stage is loaded, one waits and one is multiplied");
};

// The tiles of a cluster, one after another: bands of token tiles, in a band weight tile by weight
// tile, so that the clusters that run at a time read few rows of either side.
template <typename T, int kCtas>
struct TileOrder {
  __device__ __forceinline__ explicit TileOrder(const Large& shape)
      : band(shape.band),
        weight_tiles(shape.weight_tiles),
        token_clusters(shape.token_tiles / kCtas),
        rank(kCtas == 1 ? 0 : static_cast<int>(blockIdx.x) % kCtas),
        first(static_cast<int>(blockIdx.x) / kCtas),
        step(static_cast<int>(gridDim.x) / kCtas),
        end(token_clusters * weight_tiles) {}
  // The first token and weight row of this CTA's part of a tile.
  __device__ __forceinline__ void Place(int tile, int* token0, int* weight0) const {
    const int in_band = band * weight_tiles;
    const int at_band = tile / in_band, rest = tile % in_band;
    const int wide = min(band, token_clusters - at_band * band);
    *token0 = ((at_band * band + rest % wide) * kCtas + rank) * T::kTokens;
    *weight0 = rest / wide * T::kWeightRows;
  }
  int band, weight_tiles, token_clusters, rank;
  int first, step, end;  // tiles: first, first + step, ... below end
};

// One lane keeps copies in flight, over the borders of tiles.
template <typename T, int kCtas>
__device__ __forceinline__ void LoadStages(const CUtensorMap& tokens, const CUtensorMap& weights,
                                           const TileOrder<T, kCtas>& order, int k_blocks,
                                           uint8_t* stages, uint64_t* full, uint64_t* empty) {
  PrefetchTensorMap(&tokens);
  PrefetchTensorMap(&weights);
  int s = 0;
  uint32_t parity = 1;
  for (int tile = order.first; tile < order.end; tile += order.step) {
    int token0, weight0;
    order.Place(tile, &token0, &weight0);
    for (int block = 0; block < k_blocks; ++block) {
      BarrierWait(&empty[s], parity);
      uint8_t* const stage = stages + s * T::kStageBytes;
      BarrierArriveExpect(&full[s], T::kStageBytes);
      TmaLoad2d(stage, &tokens, &full[s], block * kFp8Block, token0, kEvictNormal);
      if constexpr (kCtas == 1) {
        TmaLoad2d(stage + T::kTokenBytes, &weights, &full[s], block * kFp8Block, weight0,
                  kEvictNormal);
      } else {
        const int part = order.rank * (T::kWeightBytes / kCtas);
        TmaLoad2dTo((1 << kCtas) - 1, stage + T::kTokenBytes + part, &weights, &full[s],
                    block * kFp8Block, weight0 + order.rank * (T::kWeightRows / kCtas),
                    kEvictNormal);
      }
      if (++s == T::kStages) {
        s = 0;
        parity ^= 1;
      }
    }
  }
}

// Warpgroups 0 and 1 multiply, warpgroup 2 keeps copies in flight. kSegmented: K has several
// segments, whose sums are added in registers. kSets: sets of accumulators; with two, a block is
// scaled while the next is multiplied. Clusters of kCtas share the weight rows of neighbouring
// token tiles: each CTA loads its part for all.
template <int kWeights, int kHalves, int kSets, bool kSegmented, int kCtas>
__global__ void __launch_bounds__(384, 1)
    Fp8LinearLarge(const __grid_constant__ CUtensorMap tokens,
                   const __grid_constant__ CUtensorMap weights,
                   const __grid_constant__ CUtensorMap out, const Large shape) {
  using T = LargeTile<kWeights, kHalves, kSegmented>;
  constexpr int kColumns = T::kColumns;
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[T::kStages], empty[T::kStages];
  uint8_t* const stages = unaligned + (1024 - SharedAddress(unaligned) % 1024) % 1024;
  uint8_t* const staged = stages + T::kStages * T::kStageBytes;
  // The same for a warp, which the compiler is told, so that descriptors are made once for all.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      BarrierInit(&full[s], 1);
      BarrierInit(&empty[s], 8 * kCtas);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (kCtas > 1) ClusterBarrier();
  LetNextKernelStart();
  WaitForPrecedingKernel();

  const TileOrder<T, kCtas> order(shape);
  if (warp >= 8) {
    RegistersDown<40>();
    if (warp == 8 && lane == 0) {
      PrefetchTensorMap(&out);
      LoadStages<T, kCtas>(tokens, weights, order, shape.k_blocks, stages, full, empty);
    }
    __syncwarp();
  } else {
    RegistersUp<232>();
    const int group = warp / 4;
    // Of the warp's rows of a tile, those of this thread: 8 apart.
    const int thread_row = 16 * (warp % 4) + lane / 4;
    uint8_t* const staged_rows = staged + group * (T::kStagedBytes / 2);
    float4* const totals = reinterpret_cast<float4*>(staged_rows) + threadIdx.x % 128;
    uint64_t* const released = Kept(empty);
    int s = 0, release_stage = 0;
    uint32_t parity = 0;
    const uint64_t token_operand =
        KMajorDescriptor(SharedAddress(stages) + group * kHalves * 64 * kFp8Block);
    const uint64_t weight_operand = KMajorDescriptor(SharedAddress(stages) + T::kTokenBytes);
    const auto multiply = [&](float(&d)[kColumns], int half) {
      const uint64_t a =
          AdvanceDescriptor(token_operand, s * T::kStageBytes + half * 64 * kFp8Block);
      const uint64_t b = AdvanceDescriptor(weight_operand, s * T::kStageBytes);
      WgmmaFence();
#pragma unroll
      for (int step = 0; step < kFp8Block / 32; ++step) {
        WgmmaInstruction<E4m3Operands, kWeights>::Shared(
            d, AdvanceDescriptor(a, 32 * step), AdvanceDescriptor(b, 32 * step), step != 0);
      }
      WgmmaCommit();
    };
    const auto next_stage = [&] {
      if (++s == T::kStages) {
        s = 0;
        parity ^= 1;
      }
    };
    const auto release = [&] {
      __syncwarp();
      if (kCtas == 1) {
        if (lane == 0) BarrierArrive(&released[release_stage]);
      } else {
        if (lane < kCtas) BarrierArriveAt(&released[release_stage], lane);
      }
      if (++release_stage == T::kStages) release_stage = 0;
    };

    for (int tile = order.first; tile < order.end; tile += order.step) {
      int token0, weight0;
      order.Place(tile, &token0, &weight0);
      // Rows beyond m are computed with any scale of a row that exists, and not stored.
      const float* x_scale[2 * kHalves];
#pragma unroll
      for (int r = 0; r < 2 * kHalves; ++r) {
        const int row = token0 + group * 64 * kHalves + r / 2 * 64 + thread_row + r % 2 * 8;
        x_scale[r] = shape.x_scales + static_cast<int64_t>(min(row, shape.m - 1)) * shape.k_blocks;
      }
      constexpr int kScaleRows = kWeights % 128 == 0 ? 128 : 64;  // weight rows of one scale
      constexpr int kScaleCount = kWeights / kScaleRows;
      const float* w_scale[kScaleCount];
#pragma unroll
      for (int r = 0; r < kScaleCount; ++r) {
        const int row = min(weight0 + r * kScaleRows, shape.n - 1);
        w_scale[r] = shape.weight_scales + static_cast<int64_t>(row / kFp8Block) * shape.k_blocks;
      }
      float x_next[2 * kHalves], w_next[kScaleCount];
#pragma unroll
      for (int r = 0; r < 2 * kHalves; ++r) x_next[r] = *x_scale[r];
#pragma unroll
      for (int r = 0; r < kScaleCount; ++r) w_next[r] = *w_scale[r];

      float sum[kHalves][kColumns];
      float part[kSets][kColumns];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sum[h][i] = 0.0f;
      }
      float x[2 * kHalves], w[kScaleCount];
      // Takes this block's scales and asks for those of the next.
      const auto take_scales = [&](int block) {
        const int ahead = min(block + 1, shape.k_blocks - 1);
#pragma unroll
        for (int r = 0; r < 2 * kHalves; ++r) {
          x[r] = x_next[r];
          x_next[r] = x_scale[r][ahead];
        }
#pragma unroll
        for (int r = 0; r < kScaleCount; ++r) {
          w[r] = w_next[r];
          w_next[r] = w_scale[r][ahead];
        }
      };
      const auto add = [&](const float(&d)[kColumns], int half) {
        float scale[kScaleCount][2];
#pragma unroll
        for (int r = 0; r < kScaleCount; ++r) {
          scale[r][0] = __fmul_rn(x[2 * half], w[r]);
          scale[r][1] = __fmul_rn(x[2 * half + 1], w[r]);
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
          sum[half][i] = __fmaf_rn(scale[2 * i / kScaleRows][i / 2 % 2], d[i], sum[half][i]);
      };
      // Adds the sums of a finished segment to the total of those before and starts the next from
      // zero. After the last, `sum` is the total.
      const auto end_segment = [&](int segment) {
        const bool last = segment == shape.segments - 1;
        if (segment == 0) {
          if (threadIdx.x % 128 == 0) StoresHaveRead();
          NamedBarrier(1 + group, 128);
        }
#pragma unroll
        for (int i = 0; i < kColumns; i += 4) {
          float4* const total = totals + 32 * i;
          float4 v = {sum[0][i], sum[0][i + 1], sum[0][i + 2], sum[0][i + 3]};
          if (segment > 0) {
            const float4 before = *total;
            v = {__fadd_rn(before.x, v.x), __fadd_rn(before.y, v.y), __fadd_rn(before.z, v.z),
                 __fadd_rn(before.w, v.w)};
          }
          if (!last) *total = v;
          sum[0][i] = last ? v.x : 0.0f;
          sum[0][i + 1] = last ? v.y : 0.0f;
          sum[0][i + 2] = last ? v.z : 0.0f;
          sum[0][i + 3] = last ? v.w : 0.0f;
        }
      };
      // Two sets of accumulators: starts a block, and adds one that has been multiplied.
      const auto start = [&](float(&d)[kColumns]) {
        BarrierWait(&full[s], parity);
        multiply(d, 0);
        next_stage();
      };
      const auto finish = [&](float(&d)[kColumns]) {
        KeepRegisters(d);
        release();
        add(d, 0);
      };
      int block = 0;
      for (int segment = 0; segment < (kSegmented ? shape.segments : 1); ++segment) {
        const int end =
            kSegmented ? min(block + shape.segment_blocks, shape.k_blocks) : shape.k_blocks;
        if constexpr (kSets == 1) {
          for (; block < end; ++block) {
            take_scales(block);
            BarrierWait(&full[s], parity);
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
              multiply(part[0], half);
              WgmmaWait<0>();
              KeepRegisters(part[0]);
              if (half == kHalves - 1) release();
              add(part[0], half);
            }
            next_stage();
          }
        } else {
          start(part[0]);
          while (block + 2 < end) {
            start(part[1]);
            take_scales(block++);
            WgmmaWait<1>();
            finish(part[0]);
            start(part[0]);
            take_scales(block++);
            WgmmaWait<1>();
            finish(part[1]);
          }
          if (block + 1 < end) {
            start(part[1]);
            take_scales(block++);
            WgmmaWait<1>();
            finish(part[0]);
            take_scales(block++);
            WgmmaWait<0>();
            finish(part[1]);
          } else {
            take_scales(block++);
            WgmmaWait<0>();
            finish(part[0]);
          }
        }
        if constexpr (kSegmented) end_segment(segment);
      }

      // To the staged rows (boxes of 64 rows x 64 columns, swizzled), and from there to memory.
      if (threadIdx.x % 128 == 0) StoresHaveRead();
      NamedBarrier(1 + group, 128);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int j = 0; j < kWeights / 8; j += 2) {
          const float* const v = &sum[h][4 * j];
          const int row = 16 * (warp % 4) + lane % 16;
          const int box = h * T::kBoxes + j / 8, chunk = j % 8 + lane / 16;
          StoreMatrices4(SharedAddress(staged_rows + box * T::kBoxBytes + row * 128 +
                                       (chunk ^ (row % 8)) * 16),
                         Bf16Pair(v[0], v[1]), Bf16Pair(v[2], v[3]), Bf16Pair(v[4], v[5]),
                         Bf16Pair(v[6], v[7]));
        }
      }
      ProxyFence();
      NamedBarrier(1 + group, 128);
      if (threadIdx.x % 128 == 0) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
#pragma unroll
          for (int box = 0; box < T::kBoxes; ++box) {
            TmaStore2d(&out, staged_rows + (h * T::kBoxes + box) * T::kBoxBytes, weight0 + 64 * box,
                       token0 + (group * kHalves + h) * 64);
          }
        }
        StoresCommit();
      }
    }
    if (threadIdx.x % 128 == 0) StoresDone();
  }
  if (kCtas > 1) ClusterBarrier();  // nobody leaves while others load into it or arrive at it
}

template <int kWeights, int kHalves, int kSets, bool kSegmented, int kCtas>
absl::Status LaunchTiles(const Fp8LinearParams& p, int segments, cudaStream_t stream) {
  using T = LargeTile<kWeights, kHalves, kSegmented>;
  MatrixMap map;
  map.rows = static_cast<uint64_t>(p.m);
  map.cols = map.row_stride_bytes = static_cast<uint64_t>(p.k);
  map.base = p.x;
  map.box_cols = kFp8Block;
  map.box_rows = T::kTokens;
  ASSIGN_OR_RETURN(const CUtensorMap tokens, EncodeMatrixMap(map));
  map.rows = static_cast<uint64_t>(p.n);
  map.base = p.weight;
  map.box_rows = kWeights / kCtas;
  ASSIGN_OR_RETURN(const CUtensorMap weights, EncodeMatrixMap(map));
  map.base = p.out;
  map.element_bytes = 2;
  map.rows = static_cast<uint64_t>(p.m);
  map.cols = static_cast<uint64_t>(p.n);
  map.row_stride_bytes = static_cast<uint64_t>(2 * p.out_stride);
  map.box_rows = 64;
  map.box_cols = 64;
  ASSIGN_OR_RETURN(const CUtensorMap out, EncodeMatrixMap(map));

  Large shape;
  shape.m = static_cast<int>(p.m);
  shape.n = static_cast<int>(p.n);
  shape.k_blocks = static_cast<int>((p.k + kFp8Block - 1) / kFp8Block);
  shape.segment_blocks = (shape.k_blocks + segments - 1) / segments;
  shape.segments = (shape.k_blocks + shape.segment_blocks - 1) / shape.segment_blocks;
  const int token_tiles = (shape.m + T::kTokens - 1) / T::kTokens;
  shape.token_tiles = (token_tiles + kCtas - 1) / kCtas * kCtas;
  shape.weight_tiles = (shape.n + kWeights - 1) / kWeights;
  constexpr int kBandTokens = 2048;
  shape.band = kBandTokens / (T::kTokens * kCtas);
  shape.x_scales = p.x_scales;
  shape.weight_scales = p.weight_scales;

  LaunchShape launch;
  launch.grid = dim3(static_cast<unsigned>(
      std::min(MultiprocessorCount() / kCtas * kCtas, shape.token_tiles * shape.weight_tiles)));
  launch.cluster = dim3(kCtas);
  launch.threads = 384;
  launch.shared_bytes = T::kBytes;
  launch.overlaps = true;
  return Launch("Fp8LinearLarge", Fp8LinearLarge<kWeights, kHalves, kSets, kSegmented, kCtas>,
                launch, stream, tokens, weights, out, shape);
}

// Work of the busiest multiprocessor, in products per row of K over the tile's measured speed.
double Cost(const Fp8LinearParams& p, int tokens, int weights, double speed) {
  const int64_t tiles = ((p.m + tokens - 1) / tokens) * ((p.n + weights - 1) / weights);
  const int64_t rounds = (tiles + MultiprocessorCount() - 1) / MultiprocessorCount();
  return static_cast<double>(rounds * tokens * weights) / speed;
}

template <int kWeights, int kHalves, int kSets, bool kSegmented>
absl::Status LaunchClusters(const Fp8LinearParams& p, int segments, cudaStream_t stream) {
  const int64_t token_tiles = (p.m + 128 * kHalves - 1) / (128 * kHalves);
  // Few token tiles leave the second CTA of a pair without work, and gain nothing.
  if (token_tiles < 8)
    return LaunchTiles<kWeights, kHalves, kSets, kSegmented, 1>(p, segments, stream);
  return LaunchTiles<kWeights, kHalves, kSets, kSegmented, 2>(p, segments, stream);
}

}  // namespace

bool Fp8LinearLargeTakes(const Fp8LinearParams& p) {
  return reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.out_stride % 8 == 0;
}

absl::Status LaunchFp8LinearLarge(const Fp8LinearParams& p, int segments, cudaStream_t stream) {
  const double square = Cost(p, 128, 128, 1.0);
  if (segments > 1) {
    const double wide = Cost(p, 128, 192, 1.03);
    return square <= wide ? LaunchClusters<128, 1, 2, true>(p, segments, stream)
                          : LaunchClusters<192, 1, 1, true>(p, segments, stream);
  }
  const double wide = Cost(p, 128, 192, 1.03), tall = Cost(p, 256, 128, 1.08);
  if (tall < square && tall < wide) return LaunchClusters<128, 2, 1, false>(p, segments, stream);
  return square <= wide ? LaunchClusters<128, 1, 2, false>(p, segments, stream)
                        : LaunchClusters<192, 1, 1, false>(p, segments, stream);
}

}  // namespace moebius::kernels::cuda
