#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/bf16_linear/bf16_linear.h"
#include "kernels/cuda/bf16_linear/merge.cuh"
#include "kernels/cuda/bf16_linear/output.cuh"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/device/wgmma.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr int kBlock = 64;  // of K: 128 bytes, a swizzled row

struct Shape {
  int n_tiles, m_tiles, heads;
  int k_blocks;
  int segments;     // the CTAs of a cluster
  int x_head_cols;  // between heads: columns of x
  int weight_head_rows;
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
  // Segments of small tiles are sent, those of others fetched (merge.cuh).
  static constexpr bool kSend = kRows == 64;
  static constexpr int kOutBytes = kBulk   ? kGroups * kPieces * kPieceBytes
                                   : kSend ? kTokens * kRows * 4
                                           : 0;
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
__device__ Place PlaceOf(const Shape& shape, int tile) {
  const int rest = tile / shape.m_tiles;
  return {rest / shape.n_tiles, rest % shape.n_tiles * T::kRows, tile % shape.m_tiles * T::kTokens};
}

template <typename T>
__device__ void LoadWeights(uint8_t* stage, const CUtensorMap* weights, uint64_t* full,
                            const Shape& shape, const Place& place, int block) {
  // Weights that other tiles read again stay in L2.
  const uint64_t policy = shape.m_tiles == 1 ? kEvictFirst : kEvictNormal;
  const int head_row = place.head * shape.weight_head_rows;
  if constexpr (T::kTransposed) {
#pragma unroll
    for (int group = 0; group < T::kRows / 64; ++group) {
      TmaLoad2d(stage + group * 64 * 128, weights, full, place.row0 + 64 * group,
                head_row + block * kBlock, policy);
    }
  } else {
    TmaLoad2d(stage, weights, full, block * kBlock, head_row + place.row0, policy);
  }
}

// One lane keeps the ring full. Weights are constants: the first stages' are on their way before
// the stream's preceding kernel has written the rows.
template <typename T>
__device__ void Load(uint8_t* stages, uint64_t* full, uint64_t* empty, const CUtensorMap* weights,
                     const CUtensorMap* tokens, const Shape& shape, int block0, int blocks) {
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
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kBlock / 16; ++step) {
    const uint64_t b = KMajorDescriptor(stage + T::kWeightBytes + 32 * step);
#pragma unroll
    for (int sub = 0; sub < T::kSubs; ++sub) {
      const uint32_t a = stage + (group * T::kSubs + sub) * 64 * 128;
      using Instruction = WgmmaInstruction<Bf16Operands, T::kTokens>;
      if constexpr (T::kTransposed) {
        Instruction::SharedTransposedA(sums[sub], MnMajorDescriptor(a + 2048 * step, 8192), b,
                                       !first || step != 0);
      } else {
        Instruction::Shared(sums[sub], KMajorDescriptor(a + 32 * step), b, !first || step != 0);
      }
    }
  }
  WgmmaCommit();
}

// One CTA of a cluster of `segments`: warpgroups 0 .. kGroups - 1 multiply, one warp more loads.
template <typename T>
__global__ void __launch_bounds__(T::kThreads + 32, T::kCtas)
    Bf16Linear(const __grid_constant__ CUtensorMap weights,
               const __grid_constant__ CUtensorMap tokens, const __grid_constant__ CUtensorMap out,
               const Shape shape) {
  extern __shared__ __align__(1024) uint8_t stages[];
  uint8_t* const outgoing = stages + T::kStages * T::kStageBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(outgoing + T::kOutBytes);
  uint64_t* const empty = full + T::kStages;
  uint64_t* const arrived = empty + T::kStages;
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
    BarrierInit(arrived, 1);
    BarrierInitFence();
    if constexpr (T::kSend) BarrierArriveExpect(arrived, T::kOutBytes);
  }
  __syncthreads();
  if constexpr (T::kSend) {
    if (shape.segments > 1) ClusterArrive();
  }
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
    } else if constexpr (T::kSend) {
      float4* const received = reinterpret_cast<float4*>(outgoing);
      ClusterWait();  // all have begun and expect what is sent
      SendShares<T::kTokens>(received, arrived, segment, shape.segments, sums[0]);
      AddShares<T::kTokens>(shape.out, received, arrived, segment, shape.segments, place.row0,
                            place.token0);
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

template <typename T>
absl::Status Launch(const Bf16LinearParams& p, int segments, cudaStream_t stream) {
  Shape shape;
  shape.heads = static_cast<int>(p.heads);
  shape.n_tiles = static_cast<int>((p.n + T::kRows - 1) / T::kRows);
  shape.m_tiles = static_cast<int>((p.m + T::kTokens - 1) / T::kTokens);
  shape.k_blocks = static_cast<int>((p.k + kBlock - 1) / kBlock);
  shape.segments = segments;
  shape.x_head_cols = static_cast<int>(p.x_head_stride);
  shape.weight_head_rows = static_cast<int>(p.weight_head_stride / p.weight_stride);
  MatrixMap map;
  map.element_bytes = 2;
  map.base = p.weight;
  map.row_stride_bytes = static_cast<uint64_t>(p.weight_stride) * 2;
  const int64_t rows = p.weight_transposed ? p.k : p.n;
  map.rows = static_cast<uint64_t>((p.heads - 1) * shape.weight_head_rows + rows);
  map.cols = static_cast<uint64_t>(p.weight_transposed ? p.n : p.k);
  map.box_cols = 64;
  map.box_rows = T::kTransposed ? kBlock : T::kRows;
  ASSIGN_OR_RETURN(const CUtensorMap weights, EncodeMatrixMap(map));
  map.base = p.x;
  map.row_stride_bytes = static_cast<uint64_t>(p.x_stride) * 2;
  map.rows = static_cast<uint64_t>(p.m);
  map.cols = static_cast<uint64_t>((p.heads - 1) * p.x_head_stride + p.k);
  map.box_rows = T::kTokens;
  ASSIGN_OR_RETURN(const CUtensorMap tokens, EncodeMatrixMap(map));
  const bool f32 = p.out_f32 != nullptr;
  void* const data = f32 ? static_cast<void*>(p.out_f32) : static_cast<void*>(p.out_bf16);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  shape.out = {data,
               f32,
               aligned && p.out_stride % 4 == 0 && p.out_head_stride % 4 == 0,
               T::kBulk && segments == 1 && aligned && p.out_stride % (f32 ? 4 : 8) == 0 &&
                   (p.heads == 1 || p.n % 64 == 0),
               static_cast<int>(p.m),
               static_cast<int>(p.n),
               p.out_stride,
               p.out_head_stride};
  CUtensorMap out = {};
  if (shape.out.bulk) {
    map.base = data;
    map.element_bytes = f32 ? 4 : 2;
    map.row_stride_bytes = static_cast<uint64_t>(p.out_stride * map.element_bytes);
    map.cols = static_cast<uint64_t>((p.heads - 1) * p.out_head_stride + p.n);
    map.box_cols = f32 ? 32 : 64;
    map.box_rows = f32 ? kPieceTokens<true> : kPieceTokens<false>;
    ASSIGN_OR_RETURN(out, EncodeMatrixMap(map));
  }

  const auto kernel = Bf16Linear<T>;
  RETURN_IF_ERROR(
      ToStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kBytes),
               "Bf16Linear"));
  if (shape.segments > 8) {
    RETURN_IF_ERROR(
        ToStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 "Bf16Linear"));
  }
  const int tiles = shape.n_tiles * shape.m_tiles * shape.heads;
  cudaLaunchConfig_t config = {};
  // Segments meet in memory that the next tile's copies would overwrite: one tile a cluster.
  config.gridDim = dim3(static_cast<unsigned>(
      shape.segments > 1 ? tiles * shape.segments
                         : std::min(tiles, T::kCtas * MultiprocessorCount())));
  config.blockDim = dim3(T::kThreads + 32);
  config.dynamicSmemBytes = T::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(shape.segments), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  // The start of a kernel that takes hundreds of microseconds needs no hiding.
  config.numAttrs = p.heads * p.n * p.k < int64_t{200'000'000} ? 2 : 1;
  return ToStatus(cudaLaunchKernelEx(&config, kernel, weights, tokens, out, shape), "Bf16Linear");
}

// The kinds of tile. What a tile is made of does not reach the bits; the times that chose them are
// in docs/kernels-cuda.md.
template <int kTokens>  // a long stream of weights, few rows
using StreamTile = Tile<kTokens, 2, 2, 1, false, false>;
template <int kTokens>  // few rows of a narrow matrix: more multiprocessors take part
using SmallTile = Tile<kTokens, 1, 1, 2, false, false>;
template <int kTokens>  // by head, K-major
using HeadTile = Tile<kTokens, 2, 1, 1, false, true>;
template <int kTokens>  // by head, MN-major, short K: all of it is on its way at once
using TransposedTile = Tile<kTokens, 2, kTokens <= 32 ? 2 : 1, 2, true, true>;

template <template <int> typename TileOf, int kMostTokens>
absl::Status LaunchFor(const Bf16LinearParams& p, int segments, cudaStream_t stream) {
  if (p.m <= 8) return Launch<TileOf<8>>(p, segments, stream);
  if (p.m <= 16) return Launch<TileOf<16>>(p, segments, stream);
  if (p.m <= 32 || kMostTokens == 32) return Launch<TileOf<32>>(p, segments, stream);
  // (A width beyond the most is not reached, and not compiled.)
  constexpr int kHalf = std::min(64, kMostTokens);
  if (p.m <= 64 || kMostTokens == 64) return Launch<TileOf<kHalf>>(p, segments, stream);
  return Launch<TileOf<kMostTokens>>(p, segments, stream);
}

absl::Status Validate(const Bf16LinearParams& p) {
  const auto bad = [](const char* field, int64_t value) {
    return absl::InvalidArgumentError(absl::StrCat("Bf16Linear: ", field, " is ", value));
  };
  const auto pointer = [](const char* field) {
    return absl::InvalidArgumentError(
        absl::StrCat("Bf16Linear: ", field, " is null or not aligned"));
  };
  constexpr int64_t kMost = int64_t{1} << 24;
  const bool plain = p.heads == 1 && !p.weight_transposed;
  if (p.m < 0 || p.m > kMost) return bad("m", p.m);
  if (p.n <= 0 || p.n > kMost || (p.weight_transposed && p.n % 8 != 0)) return bad("n", p.n);
  if (p.k <= 0 || p.k > kMost || p.k % (plain ? 8 : 64) != 0) return bad("k", p.k);
  if (p.heads <= 0 || p.heads > 4096) return bad("heads", p.heads);
  if (p.x_stride < p.k || p.x_stride % 8 != 0) return bad("x_stride", p.x_stride);
  if (p.x_head_stride < 0 || p.heads * p.x_head_stride > kMost)
    return bad("x_head_stride", p.x_head_stride);
  if (p.weight_stride < (p.weight_transposed ? p.n : p.k) || p.weight_stride % 8 != 0)
    return bad("weight_stride", p.weight_stride);
  if (p.weight_head_stride < 0 || p.weight_head_stride % p.weight_stride != 0 ||
      p.weight_head_stride / p.weight_stride > kMost / p.heads) {
    return bad("weight_head_stride", p.weight_head_stride);
  }
  if (p.out_stride < p.n) return bad("out_stride", p.out_stride);
  if (p.out_head_stride < 0) return bad("out_head_stride", p.out_head_stride);
  if ((p.m / 8 + 1) * (p.n / 64 + 1) * p.heads > int64_t{1} << 26)
    return bad("m * n * heads", p.m * p.n * p.heads);
  if (p.x == nullptr || reinterpret_cast<uintptr_t>(p.x) % 16 != 0) return pointer("x");
  if (p.weight == nullptr || reinterpret_cast<uintptr_t>(p.weight) % 16 != 0)
    return pointer("weight");
  if ((p.out_bf16 == nullptr) == (p.out_f32 == nullptr)) {
    return absl::InvalidArgumentError("Bf16Linear: not exactly one of out_bf16, out_f32 is set");
  }
  return absl::OkStatus();
}

}  // namespace

int Bf16LinearSegments(int64_t n, int64_t k) {
  const int64_t tiles = (n + 255) / 256, k_blocks = (k + kBlock - 1) / kBlock;
  int segments = 1;
  while (segments < 8 && tiles * segments < 96 && k_blocks >= 8 * segments) segments *= 2;
  return segments;
}

absl::Status LaunchBf16Linear(const Bf16LinearParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const int segments = p.heads == 1 ? Bf16LinearSegments(p.n, p.k) : 1;
  if (p.weight_transposed) return LaunchFor<TransposedTile, 64>(p, segments, stream);
  if (p.heads > 1 && p.n <= 128) return LaunchFor<HeadTile, 128>(p, segments, stream);
  const int64_t stream_tiles = (p.n + 255) / 256 * ((p.m + 127) / 128) * p.heads;
  if (stream_tiles * segments < 64) return LaunchFor<SmallTile, 32>(p, segments, stream);
  return LaunchFor<StreamTile, 128>(p, segments, stream);
}

}  // namespace moebius::kernels::cuda
