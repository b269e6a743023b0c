#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/fp8_linear/output.cuh"
#include "kernels/cuda/fp8_linear/paths.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int kMostStages = 16;
constexpr int kSharedBytes = 226 * 1024;  // of a multiprocessor, for dynamic shared memory

constexpr int kScaleBlocks = 16;

struct Small {
  int m, n, k_blocks;
  int segments, segment_blocks;
  int groups_each;  // of 8 tokens: what a CTA of a cluster merges and stores, the last ones less
  int stages;
  const float* x_scales;
  const float* weight_scales;
  uint16_t* out;
  int64_t out_stride;
  bool weights_resident;  // no kernel in front writes weights
  bool wide_stores;       // rows of `out` are 16-aligned
};

// Weight rows and token rows of a tile. A stage holds one block of K of both.
template <int kTokens, int kGroups, int kParts>
struct SmallTile {
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kThreads = 128 * kGroups * kParts;  // that multiply
  // Where registers are short, the loading warp comes with three idle ones, to give up theirs.
  static constexpr bool kMoveRegisters = kTokens == 128 && kGroups * kParts > 1;
  static constexpr int kLoaderRegisters = kThreads == 256 ? 40 : 32;
  static constexpr int kRegisters = kThreads == 256 ? 232 : 160;
  static constexpr int kAllThreads = kThreads + (kMoveRegisters ? 128 : 32);
  static constexpr int kWeightBytes = kRows * kFp8Block;
  static constexpr int kTokenBytes = kTokens * kFp8Block;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  // Blocks of weights that are asked for while the kernel in front ends. More would hold up the
  // last of its own. Resident weights may be loaded then; with many tokens that gains nothing.
  static constexpr int kPrefetched = 32 * 1024 / kWeightBytes;
  static constexpr bool kLoadAhead = kTokens <= 32;
  // Bytes in flight that are enough. More would only make the first blocks late.
  static constexpr int kInFlight = (kTokens < 64 ? 128 : 160) * 1024;
  // Scales, of 16 blocks at a time and the next 16: [16][kScalePitch] floats, for a block those of
  // the tokens and those of up to two rows of weight blocks. The pitch spreads the blocks of a
  // token over the banks.
  static constexpr int kScalePitch = kTokens + 2;
  static constexpr int kScaleBytes = 2 * kScaleBlocks * kScalePitch * 4;
  // Few tokens are stored from registers, 32 bytes of a row at a time. More of such pieces cost
  // more than to gather whole rows, where stages were; the padding spreads stmatrix over all banks.
  static constexpr bool kGather = kTokens > 16;
  static constexpr int kPitch = 2 * kRows + 16;
  static_assert(kTokens * kPitch <= kStageBytes + kScaleBytes, "rows fit where one stage was");
  // Sums that arrive from the segments: 16 bytes a thread, segment and 8 tokens.
  static constexpr int kGroupBytes = 16 * 128 * kGroups;
};

// What a CTA computes: blocks of K of a segment, of a tile of weight and token rows.
struct SmallWork {
  int weight0, token0, block0, blocks;
};

// One lane keeps copies in flight: a stage is filled as soon as all warps have released it.
template <typename T>
__device__ __forceinline__ void LoadStages(const CUtensorMap& weights, const CUtensorMap& tokens,
                                           const Small& shape, const SmallWork& work,
                                           uint8_t* stages, uint64_t* full, uint64_t* empty) {
  const auto load_weights = [&](int block, int s) {
    BarrierArriveExpect(&full[s], T::kStageBytes);
    TmaLoad2d(stages + s * T::kStageBytes, &weights, &full[s], (work.block0 + block) * kFp8Block,
              work.weight0, kEvictFirst);
  };
  const int at_once = min(shape.stages, work.blocks);
  const int ahead = T::kLoadAhead && shape.weights_resident ? at_once : 0;
#pragma unroll 1
  for (int block = 0; block < ahead; ++block) load_weights(block, block);
  if (ahead == 0) {
    // To L2 only: what the kernel in front still writes there is what is loaded afterwards.
#pragma unroll 1
    for (int block = 0; block < min(T::kPrefetched, at_once); ++block)
      TmaPrefetch2d(&weights, (work.block0 + block) * kFp8Block, work.weight0);
  }
  WaitForPrecedingKernel();
  int s = 0, parity = 1;
#pragma unroll 1
  for (int block = 0; block < work.blocks; ++block) {
    if (block >= at_once) BarrierWait(&empty[s], parity);
    if (block >= ahead) load_weights(block, s);
    TmaLoad2d(stages + s * T::kStageBytes + T::kWeightBytes, &tokens, &full[s],
              (work.block0 + block) * kFp8Block, work.token0, kEvictLast);
    if (++s == shape.stages) {
      s = 0;
      parity ^= 1;
    }
  }
}

// kParts times kGroups warpgroups multiply, 64 weight rows with a part of the tokens each; one warp
// more keeps copies in flight. kSets: sets of accumulators; with two, a block is scaled while the
// next is multiplied.
template <int kTokens, int kGroups, int kParts, int kSets, int kMine = kTokens / kParts>
__global__ void __launch_bounds__(SmallTile<kTokens, kGroups, kParts>::kAllThreads, 1)
    Fp8LinearSmall(const __grid_constant__ CUtensorMap weights,
                   const __grid_constant__ CUtensorMap tokens, const Small shape) {
  using T = SmallTile<kTokens, kGroups, kParts>;
  constexpr int kWarps = T::kThreads / 32;
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[kMostStages], empty[kMostStages], merged;
  uint8_t* const stages = unaligned + (1024 - SharedAddress(unaligned) % 1024) % 1024;
  float* const scales = reinterpret_cast<float*>(stages + shape.stages * T::kStageBytes);
  uint8_t* const arriving = stages + shape.stages * T::kStageBytes + T::kScaleBytes;
  const int weight0 = blockIdx.x * T::kRows;
  const int token0 = blockIdx.y * kTokens;
  const int segment = blockIdx.z;
  const int block0 = segment * shape.segment_blocks;
  const int blocks = min(shape.segment_blocks, shape.k_blocks - block0);
  // The same for a warp, which the compiler is told, so that descriptors are made once for all.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int my_groups = min(shape.groups_each, kTokens / 8 - segment * shape.groups_each);

  if (warp >= kWarps) {
    // The loading warp makes the barriers itself, so that it need not wait for anybody; one lane,
    // since those of several would be made one after another all the same.
    if (warp == kWarps) {
      if (lane == 0) {
#pragma unroll
        for (int s = 0; s < kMostStages; ++s) {
          BarrierInit(&full[s], 1);
          BarrierInit(&empty[s], kWarps);
        }
        BarrierInit(&merged, 1);
        BarrierInitFence();
        if (shape.segments > 1 && my_groups > 0)
          BarrierArriveExpect(&merged, shape.segments * my_groups * T::kGroupBytes);
      }
      __syncwarp();
      NamedBarrierArrive(2, T::kThreads + 32);
    }
    if (shape.segments > 1) ClusterArriveRelaxed();
    if constexpr (T::kMoveRegisters) RegistersDown<T::kLoaderRegisters>();
    if (warp == kWarps && lane == 0) {
      LoadStages<T>(weights, tokens, shape, {weight0, token0, block0, blocks}, stages, full, empty);
    }
    __syncwarp();
    if (shape.segments > 1) ClusterWait();
    return;
  }
  if (shape.segments > 1) ClusterArriveRelaxed();
  LetNextKernelStart();

  if constexpr (T::kMoveRegisters) RegistersUp<T::kRegisters>();
  const int group = warp / 4 % kGroups, token_part = warp / 4 / kGroups;
  const int first_mine = token_part * kMine;
  float sum[kMine / 2];
  float part[kSets][kMine / 2];
#pragma unroll
  for (int i = 0; i < kMine / 2; ++i) sum[i] = 0.0f;

  // Scales of blocks 16 i .. 16 i + 15 of this segment, on their way to shared memory.
  const int first_weight_block = weight0 / kFp8Block;
  const auto load_scales = [&](int i) {
    const int in = threadIdx.x % kScaleBlocks;
    if (i * kScaleBlocks + in >= blocks) return;
    const int column = block0 + i * kScaleBlocks + in;
    float* const to = scales + (i % 2 * kScaleBlocks + in) * T::kScalePitch;
    const auto copy = [&](float* to, const float* from) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(to)), "l"(from)
                   : "memory");
    };
    const int thread_row = threadIdx.x / kScaleBlocks;
    // Rows beyond m or n are computed with any scale that exists, and not stored.
#pragma unroll
    for (int r = 0; r < kTokens; r += T::kThreads / kScaleBlocks) {
      const int t = r + thread_row;
      if (kTokens % (T::kThreads / kScaleBlocks) != 0 && t >= kTokens) break;
      const int row = min(token0 + t, shape.m - 1);
      copy(to + t, shape.x_scales + static_cast<int64_t>(row) * shape.k_blocks + column);
    }
    if (thread_row < 2) {
      const int row = min(first_weight_block + thread_row, (shape.n - 1) / kFp8Block);
      copy(to + kTokens + thread_row,
           shape.weight_scales + static_cast<int64_t>(row) * shape.k_blocks + column);
    }
  };
  WaitForPrecedingKernel();
  load_scales(0);
  NamedBarrier(2, T::kThreads + 32);      // the barriers exist,
  if (shape.segments > 1) ClusterWait();  // those of the cluster too

  // While the first blocks are on their way: the addresses of the end, where each instruction
  // counts. What a CTA adds is kept [segment][group of 8 tokens][thread of weight rows].
  const ThreadOutput out =
      OutputOfThread(shape.out, shape.out_stride, weight0 + 64 * group + 16 * (warp % 4), token0,
                     shape.n, shape.m, shape.wide_stores);
  const uint8_t* const received = Kept(arriving + 16 * (threadIdx.x % (128 * kGroups)));
  int to_cta = 0, to_group = 0;
  if (shape.segments > 1) {
    to_cta = first_mine / 8 / shape.groups_each;
    to_group = first_mine / 8 % shape.groups_each;
  }
  // Of the groups of this warpgroup one after another: where its sums go, and who counts them.
  const auto next_destination = [&] {
    const uint2 found = {
        ClusterAddress(
            SharedAddress(received) + (segment * shape.groups_each + to_group) * T::kGroupBytes,
            to_cta),
        ClusterAddress(SharedAddress(&merged), to_cta)};
    if (++to_group == shape.groups_each) {
      to_group = 0;
      ++to_cta;
    }
    return found;
  };
  constexpr bool kPlanned = kMine < 128;  // else registers are short
  uint2 destination[kPlanned ? kMine / 8 : 1];
  if constexpr (kPlanned) {
#pragma unroll
    for (int j = 0; j < kMine / 8; ++j) destination[j] = next_destination();
  }

  int issue_stage = 0, issue_parity = 0;
  bool loaded = false;  // what is issued next, as far as is known
  const uint64_t weight_operand = KMajorDescriptor(SharedAddress(stages) + group * 64 * kFp8Block);
  const uint64_t token_operand =
      KMajorDescriptor(SharedAddress(stages) + T::kWeightBytes + first_mine * kFp8Block);
  const auto multiply = [&](float(&d)[kMine / 2]) {
    if (!loaded) BarrierWait(&full[issue_stage], issue_parity);
    const uint64_t a = AdvanceDescriptor(weight_operand, issue_stage * T::kStageBytes);
    const uint64_t b = AdvanceDescriptor(token_operand, issue_stage * T::kStageBytes);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kFp8Block / 32; ++step) {
      WgmmaInstruction<E4m3Operands, kMine>::Shared(d, AdvanceDescriptor(a, 32 * step),
                                                    AdvanceDescriptor(b, 32 * step), step != 0);
    }
    WgmmaCommit();
    if (++issue_stage == shape.stages) {
      issue_stage = 0;
      issue_parity ^= 1;
    }
  };
  // Where this thread finds the scales of its columns, and of its warpgroup's weight rows.
  const float* const column_scales = scales + first_mine + 2 * (lane % 4);
  const float* const row_scale =
      scales + kTokens + ((weight0 + 64 * group) / kFp8Block - first_weight_block);
  // Scales of the block that is added next. While wgmma reads shared memory anything else waits
  // long for it: they are read a block ahead, and so is whether the next stage has been loaded.
  struct Scales {
    float2 columns[kMine / 8];
    float rows;
  } scale;
  const auto read_scales = [&](int block) {
    if (block % kScaleBlocks == 0) {
      asm volatile("cp.async.wait_all;" ::: "memory");
      NamedBarrier(1, T::kThreads);  // all have theirs, and nobody reads the 16 before
      load_scales(block / kScaleBlocks + 1);
    }
    const int at = block % (2 * kScaleBlocks) * T::kScalePitch;
    Scales read;
    read.rows = row_scale[at];
#pragma unroll
    for (int j = 0; j < kMine / 8; ++j)
      read.columns[j] = *reinterpret_cast<const float2*>(column_scales + at + 8 * j);
    return read;
  };
  constexpr bool kAhead = kMine < 128;  // else registers are short
  if constexpr (kAhead) scale = read_scales(0);
  uint64_t* const released = Kept(empty);
  int scale_stage = 0;
  // Adds a block's products, of which at most kPending blocks are still being multiplied.
  const auto add = [&]<int kPending>(float(&d)[kMine / 2], int block) {
    Scales next;
    if constexpr (kAhead) next = read_scales(block + 1);
    WgmmaWait<kPending>();
    KeepRegisters(d);
    __syncwarp();
    if (lane == 0) BarrierArrive(&released[scale_stage]);
    loaded = BarrierHasPassed(&full[issue_stage], issue_parity);
    if constexpr (!kAhead) scale = read_scales(block);
#pragma unroll
    for (int j = 0; j < kMine / 8; ++j) {
      const float of_column[2] = {__fmul_rn(scale.columns[j].x, scale.rows),
                                  __fmul_rn(scale.columns[j].y, scale.rows)};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sum[4 * j + c] = __fmaf_rn(of_column[c % 2], d[4 * j + c], sum[4 * j + c]);
    }
    if constexpr (kAhead) scale = next;
    if (++scale_stage == shape.stages) scale_stage = 0;
  };
  if constexpr (kSets == 1) {
    for (int block = 0; block < blocks; ++block) {
      multiply(part[0]);
      add.template operator()<0>(part[0], block);
    }
  } else if (blocks > 0) {
    multiply(part[0]);
    int block = 0;
    for (; block + 2 < blocks; block += 2) {
      multiply(part[1]);
      add.template operator()<1>(part[0], block);
      multiply(part[0]);
      add.template operator()<1>(part[1], block + 1);
    }
    if (block + 1 < blocks) {
      multiply(part[1]);
      add.template operator()<1>(part[0], block);
      add.template operator()<0>(part[1], block + 1);
    } else {
      add.template operator()<0>(part[0], block);
    }
  }

  // Groups of 8 tokens from `first` on, in the tile; sums(i) are those of group first + i. They are
  // gathered from row 8 `at` on.
  const auto put = [&]<int kMost>(int first, int at, int count, const auto& sums) {
    if constexpr (T::kGather) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i < count)
          StoreSumsTransposed(stages + 8 * (at + i) * T::kPitch + 32 * (4 * group + warp % 4),
                              T::kPitch, sums(i));
      }
    } else {
      StoreGroups<kMost>(out, first, count, sums);
    }
  };
  // After all warps have gathered `groups` groups, which begin with `first` of the tile.
  const auto store_gathered = [&](int first, int groups) {
    NamedBarrier(1, T::kThreads);
    const int row0 = token0 + 8 * first, columns = min(T::kRows, shape.n - weight0);
    StoreRows<T::kRows, T::kThreads>(
        shape.out + static_cast<int64_t>(row0) * shape.out_stride + weight0, shape.out_stride,
        stages, T::kPitch, min(8 * groups, shape.m - row0), columns, shape.wide_stores);
  };
  if (shape.segments == 1) {
    if (T::kGather) NamedBarrier(1, T::kThreads);  // nobody reads the stages any more
    put.template operator()<kMine / 8>(first_mine / 8, first_mine / 8, kMine / 8, [&](int j) {
      return float4{sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]};
    });
    if (T::kGather) store_gathered(0, kTokens / 8);
    return;
  }
#pragma unroll
  for (int j = 0; j < kMine / 8; ++j) {
    const uint2 to = kPlanned ? destination[kPlanned ? j : 0] : next_destination();
    StoreAsync(to.x, {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]}, to.y);
  }
  if (my_groups <= 0) return;
  if (T::kGather) NamedBarrier(1, T::kThreads);  // nobody reads the stages any more
  BarrierWaitForCluster(&merged, 0);
  // The parts of the warpgroups take turns.
  constexpr int kAtOnce = kMine < 32 ? kMine / 8 : 4 / kParts;
#pragma unroll 1
  for (int j = token_part * kAtOnce; j < my_groups; j += kParts * kAtOnce) {
    const uint8_t* from = received + j * T::kGroupBytes;
    float4 v[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (j + u < my_groups) v[u] = *reinterpret_cast<const float4*>(from + u * T::kGroupBytes);
#pragma unroll 1
    for (int other = 1; other < shape.segments; ++other) {
      from += shape.groups_each * T::kGroupBytes;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (j + u >= my_groups) break;
        const float4 a = *reinterpret_cast<const float4*>(from + u * T::kGroupBytes);
        v[u] = {__fadd_rn(v[u].x, a.x), __fadd_rn(v[u].y, a.y), __fadd_rn(v[u].z, a.z),
                __fadd_rn(v[u].w, a.w)};
      }
    }
    put.template operator()<kAtOnce>(segment * shape.groups_each + j, j, my_groups - j,
                                     [&](int u) { return v[u]; });
  }
  if (T::kGather) store_gathered(segment * shape.groups_each, my_groups);
}

template <int kTokens, int kGroups, int kParts>
absl::Status LaunchTiles(const Fp8LinearParams& p, int segments, cudaStream_t stream) {
  // A single warpgroup has nobody else to multiply while it scales.
  constexpr int kSets = kGroups == 1 && kTokens / kParts <= 64 ? 2 : 1;
  using T = SmallTile<kTokens, kGroups, kParts>;
  MatrixMap map;
  map.rows = static_cast<uint64_t>(p.n);
  map.cols = map.row_stride_bytes = static_cast<uint64_t>(p.k);
  map.base = p.weight;
  map.box_cols = kFp8Block;
  map.box_rows = T::kRows;
  ASSIGN_OR_RETURN(const CUtensorMap weights, EncodeMatrixMap(map));
  map.rows = static_cast<uint64_t>(p.m);
  map.base = p.x;
  map.box_rows = kTokens;
  ASSIGN_OR_RETURN(const CUtensorMap tokens, EncodeMatrixMap(map));

  Small shape;
  shape.m = static_cast<int>(p.m);
  shape.n = static_cast<int>(p.n);
  shape.k_blocks = static_cast<int>((p.k + kFp8Block - 1) / kFp8Block);
  shape.segment_blocks = (shape.k_blocks + segments - 1) / segments;
  segments = shape.segments = (shape.k_blocks + shape.segment_blocks - 1) / shape.segment_blocks;
  shape.groups_each = (kTokens / 8 + segments - 1) / segments;
  shape.weights_resident = p.weights_resident;
  shape.x_scales = p.x_scales;
  shape.weight_scales = p.weight_scales;
  shape.out = reinterpret_cast<uint16_t*>(p.out);
  shape.out_stride = p.out_stride;
  shape.wide_stores = reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.out_stride % 8 == 0;
  const int arriving = segments == 1 ? 0 : segments * shape.groups_each * T::kGroupBytes;
  const int budget = kSharedBytes - 1024 - T::kScaleBytes - arriving;
  // An even number, since blocks come from memory in pairs (256 bytes of a row).
  constexpr int kEnough = kTokens == 128 ? kMostStages : T::kInFlight / T::kStageBytes / 2 * 2;
  shape.stages = std::min({kMostStages, kEnough, shape.segment_blocks, budget / T::kStageBytes});
  if (shape.stages < std::min(2, shape.segment_blocks))
    return absl::InternalError("Fp8LinearSmall: a tile too large for shared memory");
  LaunchShape launch;
  launch.grid =
      dim3(static_cast<unsigned>((p.n + T::kRows - 1) / T::kRows),
           static_cast<unsigned>((p.m + kTokens - 1) / kTokens), static_cast<unsigned>(segments));
  launch.cluster = dim3(1, 1, static_cast<unsigned>(segments));
  launch.threads = T::kAllThreads;
  launch.shared_bytes = 1024 + shape.stages * T::kStageBytes + T::kScaleBytes + arriving;
  launch.overlaps = true;
  return Launch("Fp8LinearSmall", Fp8LinearSmall<kTokens, kGroups, kParts, kSets>, launch, stream,
                weights, tokens, shape);
}

// The narrowest tile that gives every CTA a multiprocessor of its own; widest where none does.
template <int kTokens>
absl::Status LaunchFor(const Fp8LinearParams& p, int segments, cudaStream_t stream) {
  const int64_t tiles = segments * ((p.m + kTokens - 1) / kTokens);
  const auto fits = [&](int64_t rows) {
    return tiles * ((p.n + rows - 1) / rows) <= MultiprocessorCount();
  };
  constexpr int kParts = kTokens == 128 ? 2 : 1;
  if (fits(64)) return LaunchTiles<kTokens, 1, kParts>(p, segments, stream);
  if (fits(128)) return LaunchTiles<kTokens, 2, 1>(p, segments, stream);
  return LaunchTiles<kTokens, 3, 1>(p, segments, stream);
}

}  // namespace

absl::Status LaunchFp8LinearSmall(const Fp8LinearParams& p, int segments, cudaStream_t stream) {
  if (p.m <= 8) return LaunchFor<8>(p, segments, stream);
  if (p.m <= 16) return LaunchFor<16>(p, segments, stream);
  if (p.m <= 32) return LaunchFor<32>(p, segments, stream);
  if (p.m <= 64) return LaunchFor<64>(p, segments, stream);
  return LaunchFor<128>(p, segments, stream);
}

}  // namespace moebius::kernels::cuda
