#include "kernels/cuda/expert_ffn/expert_ffn.h"

#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/expert_ffn/tile_list.cuh"
#include "kernels/cuda/expert_ffn/tile_output.cuh"
#include "kernels/cuda/expert_ffn/tile_shape.h"

namespace moebius::kernels::cuda {
namespace {

struct Args {
  const ExpertEntry* experts;
  int num_experts;
  const int32_t* row_offsets;
  int rows_max;
  int hidden, intermediate;
  const uint8_t* x_codes;
  const float* x_scales;
  const int32_t* row_index;
  uint8_t* inner_codes;
  float* inner_scales;
  int32_t* counters;
  uint16_t* out;
  bool power_of_two_scales;
  bool with_down;
};

constexpr int kWeightBytes = 2 * kTileColumns * kTileK;
constexpr int kRowBytes = kTileRows * kTileK;
constexpr int kStageBytes = kWeightBytes + kRowBytes;
constexpr int kStageScales = kTileRows + 2;  // of rows; of the two weight blocks
constexpr int kStages = (202 * 1024) / kStageBytes;
constexpr int kTileEntries = 4;  // tiles announced and not yet taken up by everybody
constexpr int kThreads = kConsumers + 128;
constexpr int kRowWarps = 2;
// Of a thread; the CTA starts with 168 each and can only share out those.
constexpr int kConsumerRegisters = 232, kLoaderRegisters = 40;
static_assert(kConsumers * kConsumerRegisters + 128 * kLoaderRegisters <= kThreads * 168,
              "more would wait for ever");

// Who waits for an announced tile: the warps of the consumers, of rows and of scales.
constexpr int kTileReaders = kConsumers / 32 + kRowWarps + 1;

struct Shared {
  alignas(1024) uint8_t stages[kStages][kStageBytes];  // weights, then rows; 128-byte swizzled
  alignas(16) uint8_t turn[kTurnBytes];
  alignas(16) float scales[kStages][kStageScales];
  int32_t source_rows[kTileRows];  // what LoadRows copies; registers would not suffice
  uint64_t full[kStages], empty[kStages];
  uint64_t announced[kTileEntries], taken[kTileEntries];
  ExpertTile tiles[kTileEntries];
  TileList list;
  int32_t last;
};
static_assert(sizeof(Shared) + 1024 <= 227 * 1024, "a CTA has 227 KB of shared memory");

__device__ __forceinline__ int Blocks(int size) { return (size + kTileK - 1) / kTileK; }

// Position in the ring of stages. Every role walks the same sequence of K blocks.
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

class TileReader {
 public:
  __device__ __forceinline__ ExpertTile Next(Shared& shared) {
    const int entry = static_cast<int>(count_ % kTileEntries);
    BarrierWait(&shared.announced[entry], (count_ / kTileEntries) % 2);
    const ExpertTile tile = shared.tiles[entry];
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(&shared.taken[entry]);
    ++count_;
    return tile;
  }

 private:
  uint32_t count_ = 0;
};

// Copies 4 or 16 bytes asynchronously, zeros if not `present`.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool present) {
  const int bytes = present ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  }
}
// One arrival of this thread at `barrier` once its copies so far have landed.
__device__ __forceinline__ void ArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// One thread: draws tickets, announces tiles and keeps weights in flight, across tiles.
__device__ __forceinline__ void LoadWeights(const Args& args, Shared& shared) {
  StageCursor cursor;
  const int gate_up_columns = Blocks(args.intermediate);
  const int down_columns = args.with_down ? (args.hidden + 255) / 256 : 0;
  int ticket = atomicAdd(args.counters + kCounterTicket, 1);
  for (uint32_t count = 0;; ++count) {
    const ExpertTile tile =
        shared.list.Find(ticket, args.num_experts, gate_up_columns, down_columns);
    const int entry = static_cast<int>(count % kTileEntries);
    BarrierWait(&shared.taken[entry], (count / kTileEntries) % 2 ^ 1);
    shared.tiles[entry] = tile;
    BarrierArrive(&shared.announced[entry]);
    if (tile.kind == TileKind::kStop) return;
    const bool down = tile.kind == TileKind::kDown;
    const ExpertEntry& expert = args.experts[tile.expert];
    const CUtensorMap* const first = down ? &expert.down : &expert.gate;
    const CUtensorMap* const second = down ? &expert.down : &expert.up;
    const int second_column = tile.column + (down ? kTileColumns : 0);
    TensorMapFence(first);
    if (!down) TensorMapFence(second);
    const int expert_rows =
        shared.list.row_offsets[tile.expert + 1] - shared.list.row_offsets[tile.expert];
    const uint64_t policy = expert_rows <= kTileRows ? kEvictFirst : kEvictNormal;
    const int blocks = Blocks(down ? args.intermediate : args.hidden);
    for (int block = 0; block < blocks; ++block) {
      // The answer is needed when this tile is issued; a later question shares tiles more evenly.
      if (block == max(blocks - 3, 0)) ticket = atomicAdd(args.counters + kCounterTicket, 1);
      const int s = cursor.stage;
      BarrierWait(&shared.empty[s], cursor.parity ^ 1);
      uint8_t* const stage = shared.stages[s];
      BarrierArriveExpect(&shared.full[s], kWeightBytes);
      TmaLoad2d(stage, first, &shared.full[s], block * kTileK, tile.column, policy);
      TmaLoad2d(stage + kWeightBytes / 2, second, &shared.full[s], block * kTileK, second_column,
                policy);
      cursor.Advance();
    }
  }
}

// Until all columns of the tile's requantised rows are in device memory.
__device__ __forceinline__ void WaitForRows(const Args& args, const ExpertTile& tile) {
  const int32_t* const counter = args.counters + kCounterTiles + tile.row_tile;
  const int columns = Blocks(args.intermediate);
  for (;;) {
    int finished;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(finished) : "l"(counter) : "memory");
    if (finished >= columns) return;
    __nanosleep(100);
  }
}

// The row that packed row `row` of a tile reads.
__device__ __forceinline__ int SourceRow(const Args& args, bool down, int row) {
  return down || args.row_index == nullptr ? row : args.row_index[row];
}

// Warp `part` of kRowWarps: gathers the codes of the tile's rows.
__device__ __forceinline__ void LoadRows(const Args& args, Shared& shared, int part) {
  constexpr int kAtOnce = kRowWarps * 32 / 8;  // rows; 8 threads copy one
  const int thread = part * 32 + static_cast<int>(threadIdx.x) % 32;
  const int chunk = thread % 8, row_of_thread = thread / 8;
  const uint32_t place = kWeightBytes + row_of_thread * kTileK + (chunk ^ row_of_thread % 8) * 16;
  StageCursor cursor;
  TileReader reader;
  for (;;) {
    const ExpertTile tile = reader.Next(shared);
    if (tile.kind == TileKind::kStop) return;
    const bool down = tile.kind == TileKind::kDown;
    if (down) WaitForRows(args, tile);
    const int width = down ? args.intermediate : args.hidden;
    const uint8_t* const codes = down ? args.inner_codes : args.x_codes;
    __syncwarp();
    // Each warp keeps the rows that it copies itself.
    for (int i = thread % 32; i < kTileRows / kRowWarps; i += 32) {
      const int row = i / 4 * kAtOnce + part * 4 + i % 4;
      shared.source_rows[row] = row < tile.rows ? SourceRow(args, down, tile.row + row) : -1;
    }
    __syncwarp();
    for (int column = chunk * 16; column - chunk * 16 < width; column += kTileK) {
      const int s = cursor.stage;
      BarrierWait(&shared.empty[s], cursor.parity ^ 1);
      const uint32_t to = SharedAddress(shared.stages[s]) + place;
      // Tiles are computed in widths of up to twice their rows: what lies between is zero.
#pragma unroll
      for (int i = 0; i < kTileRows / kAtOnce; ++i) {
        if (i * kAtOnce >= 2 * tile.rows) break;
        const int source = shared.source_rows[row_of_thread + i * kAtOnce];
        const bool present = source >= 0 && column < width;
        const int64_t offset = present ? static_cast<int64_t>(source) * width + column : 0;
        CopyAsync<16>(to + i * kAtOnce * kTileK, codes + offset, present);
      }
      ArriveAfterCopies(&shared.full[s]);
      cursor.Advance();
    }
  }
}

// One warp: the scales of the tile's rows and of its two weight matrices.
__device__ __forceinline__ void LoadScales(const Args& args, Shared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  StageCursor cursor;
  TileReader reader;
  for (;;) {
    const ExpertTile tile = reader.Next(shared);
    if (tile.kind == TileKind::kStop) return;
    const bool down = tile.kind == TileKind::kDown;
    if (down) WaitForRows(args, tile);
    const int blocks = Blocks(down ? args.intermediate : args.hidden);
    const float* const scales = down ? args.inner_scales : args.x_scales;
    const float* of_row[kTileRows / 32];
#pragma unroll
    for (int i = 0; i < kTileRows / 32; ++i) {
      const int row = lane + 32 * i;
      of_row[i] =
          row < tile.rows
              ? scales + static_cast<int64_t>(SourceRow(args, down, tile.row + row)) * blocks
              : nullptr;
    }
    // Lanes 0 and 1: the first and the second matrix. The second of down may lie beyond its end,
    // where any scale does.
    const ExpertEntry& expert = args.experts[tile.expert];
    const int column_block = tile.column / kTileColumns;
    const int last_block = Blocks(down ? args.hidden : args.intermediate) - 1;
    const float* of_weights = down        ? expert.down_scales
                              : lane == 0 ? expert.gate_scales
                                          : expert.up_scales;
    of_weights +=
        static_cast<int64_t>(min(column_block + (down && lane == 1 ? 1 : 0), last_block)) * blocks;
    for (int block = 0; block < blocks; ++block) {
      const int s = cursor.stage;
      BarrierWait(&shared.empty[s], cursor.parity ^ 1);
      const uint32_t to = SharedAddress(shared.scales[s]);
#pragma unroll
      for (int i = 0; i < kTileRows / 32; ++i) {
        if (i * 32 >= 2 * tile.rows) break;
        const bool present = of_row[i] != nullptr;
        CopyAsync<4>(to + (lane + 32 * i) * 4, present ? of_row[i] + block : scales, present);
      }
      if (lane < 2) CopyAsync<4>(to + (kTileRows + lane) * 4, of_weights + block, true);
      ArriveAfterCopies(&shared.full[s]);
      cursor.Advance();
    }
  }
}

template <int kWidth>
__device__ __forceinline__ void IssueBlock(float (&part)[kWidth / 2], uint32_t weights,
                                           uint32_t rows) {
#pragma unroll
  for (int step = 0; step < kTileK / 32; ++step) {
    WgmmaInstruction<E4m3Operands, kWidth>::Shared(part, KMajorDescriptor(weights + 32 * step),
                                                   KMajorDescriptor(rows + 32 * step), step != 0);
  }
  WgmmaCommit();
}

// sum = fma(scale of row * scale of weights, part, sum).
template <int kWidth>
__device__ __forceinline__ void AddScaled(float (&sum)[kWidth / 2], const float (&part)[kWidth / 2],
                                          const float* row_scales, float weight_scale) {
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
    const float2 pair =
        *reinterpret_cast<const float2*>(row_scales + 8 * j + 2 * (threadIdx.x % 4));
    const float scale[2] = {__fmul_rn(pair.x, weight_scale), __fmul_rn(pair.y, weight_scale)};
#pragma unroll
    for (int c = 0; c < 4; ++c)
      sum[4 * j + c] = __fmaf_rn(scale[c % 2], part[4 * j + c], sum[4 * j + c]);
  }
}

// Both products of a tile for this warpgroup's 64 columns of either matrix.
template <int kWidth>
__device__ __forceinline__ void MultiplyTile(Shared& shared, StageCursor& cursor, int group,
                                             int blocks, float (&first)[kWidth / 2],
                                             float (&second)[kWidth / 2]) {
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) first[i] = second[i] = 0.0f;
  for (int block = 0; block < blocks; ++block) {
    const int s = cursor.stage;
    BarrierWait(&shared.full[s], cursor.parity);
    ProxyFence();  // rows came by ordinary asynchronous copies
    const uint32_t weights = SharedAddress(shared.stages[s]) + group * 64 * kTileK;
    const uint32_t rows = SharedAddress(shared.stages[s]) + kWeightBytes;
    const float* const scales = shared.scales[s];
    const float scale_first = scales[kTileRows], scale_second = scales[kTileRows + 1];
    float part[kWidth / 2];
    WgmmaFence();
    IssueBlock<kWidth>(part, weights, rows);
    if constexpr (kWidth <= 64) {
      float other[kWidth / 2];
      IssueBlock<kWidth>(other, weights + kTileColumns * kTileK, rows);
      WgmmaWait<1>();
      KeepRegisters(part);
      AddScaled<kWidth>(first, part, scales, scale_first);
      WgmmaWait<0>();
      KeepRegisters(other);
      AddScaled<kWidth>(second, other, scales, scale_second);
    } else {
      WgmmaWait<0>();
      KeepRegisters(part);
      AddScaled<kWidth>(first, part, scales, scale_first);
      WgmmaFence();
      IssueBlock<kWidth>(part, weights + kTileColumns * kTileK, rows);
      WgmmaWait<0>();
      KeepRegisters(part);
      AddScaled<kWidth>(second, part, scales, scale_second);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(&shared.empty[s]);
    cursor.Advance();
  }
}

template <int kWidth>
__device__ __forceinline__ void ComputeTile(const Args& args, Shared& shared, StageCursor& cursor,
                                            const ExpertTile& tile) {
  const bool down = tile.kind == TileKind::kDown;
  float first[kWidth / 2], second[kWidth / 2];
  MultiplyTile<kWidth>(shared, cursor, static_cast<int>(threadIdx.x) / 128,
                       Blocks(down ? args.intermediate : args.hidden), first, second);
  if (down) {
    const auto store = [&](int column) {
      return [&args, &tile, column](int row, int lane_of_row, const RowVector& v) {
        if (row >= tile.rows) return;
        uint16_t* const out = args.out + static_cast<int64_t>(tile.row + row) * args.hidden;
        StoreVector<true>(v, out, column + lane_of_row * kVectorElements, args.hidden);
      };
    };
    ForRowsOfTile<kWidth>(first, shared.turn, store(tile.column));
    ForRowsOfTile<kWidth>(second, shared.turn, store(tile.column + kTileColumns));
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) first[i] = SwiGlu(first[i], second[i]);
  ForRowsOfTile<kWidth>(first, shared.turn, [&](int row, int lane_of_row, const RowVector& v) {
    const BlockScale scale = ScaleOfBlock(LargestOfBlock(v), args.power_of_two_scales);
    if (row >= tile.rows) return;
    const int64_t packed = tile.row + row;
    StoreCodes<true>(CodesOfVector(v, scale), args.inner_codes + packed * args.intermediate,
                     tile.column + lane_of_row * kVectorElements, args.intermediate);
    if (lane_of_row == 0) {
      args.inner_scales[packed * Blocks(args.intermediate) + tile.column / kTileColumns] =
          scale.scale;
    }
  });
  if (threadIdx.x == 0) {
    __threadfence();  // everybody's stores, which the barrier ordered before this
    atomicAdd(args.counters + kCounterTiles + tile.row_tile, 1);
  }
}

__device__ __forceinline__ void Compute(const Args& args, Shared& shared) {
  StageCursor cursor;
  TileReader reader;
  for (;;) {
    const ExpertTile tile = reader.Next(shared);
    if (tile.kind == TileKind::kStop) return;
    if (tile.rows <= 8) {
      ComputeTile<8>(args, shared, cursor, tile);
    } else if (tile.rows <= 16) {
      ComputeTile<16>(args, shared, cursor, tile);
    } else if (tile.rows <= 32) {
      ComputeTile<32>(args, shared, cursor, tile);
    } else if (tile.rows <= 64) {
      ComputeTile<64>(args, shared, cursor, tile);
    } else {
      ComputeTile<128>(args, shared, cursor, tile);
    }
  }
}

// Persistent, one CTA a multiprocessor: warpgroups 0 and 1 multiply; the warps of the third load.
__global__ void __launch_bounds__(kThreads, 1) ExpertFfn(const Args args) {
  extern __shared__ uint8_t unaligned[];
  Shared& shared =
      *reinterpret_cast<Shared*>(unaligned + (1024 - SharedAddress(unaligned) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      BarrierInit(&shared.full[s], 1 + kRowWarps * 32 + 32);  // the copy engine's and each copier's
      BarrierInit(&shared.empty[s], kConsumers / 32);
    }
    for (int entry = 0; entry < kTileEntries; ++entry) {
      BarrierInit(&shared.announced[entry], 1);
      BarrierInit(&shared.taken[entry], kTileReaders);
    }
    BarrierInitFence();
  }
  shared.list.Build(args.row_offsets, args.num_experts, args.rows_max);  // with a barrier

  if (threadIdx.x >= kConsumers) {
    RegistersDown<kLoaderRegisters>();
    const int warp = (static_cast<int>(threadIdx.x) - kConsumers) / 32;
    if (warp == 0) {
      if (threadIdx.x % 32 == 0) LoadWeights(args, shared);
      __syncwarp();
    } else if (warp <= kRowWarps) {
      LoadRows(args, shared, warp - 1);
    } else {
      LoadScales(args, shared);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    RegistersUp<kConsumerRegisters>();
    Compute(args, shared);
  }

  // The last CTA to get here leaves the counters as the next launch expects them.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const int before = atomicAdd(args.counters + kCounterDone, 1);
    shared.last = before == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (shared.last == 0) return;
  const int row_tiles = shared.list.row_tiles[args.num_experts];
  for (int i = static_cast<int>(threadIdx.x); i < row_tiles; i += kThreads)
    args.counters[kCounterTiles + i] = 0;
  if (threadIdx.x == 0) args.counters[kCounterTicket] = args.counters[kCounterDone] = 0;
}

constexpr char kOp[] = "ExpertFfn";

absl::Status Validate(const GroupedFfnParams& p, bool with_down) {
  if (p.table == nullptr) return Refuse(kOp, "table is null");
  if (p.workspace == nullptr) return Refuse(kOp, "workspace is null");
  RETURN_IF_ERROR(CheckRange(kOp, "first_expert", p.first_expert, 0, p.table->size()));
  RETURN_IF_ERROR(
      CheckRange(kOp, "num_experts", p.num_experts, 0,
                 std::min(p.table->size() - p.first_expert, p.workspace->experts_max())));
  RETURN_IF_ERROR(CheckRange(kOp, "rows_max", p.rows_max, 0, p.workspace->rows_max()));
  RETURN_IF_ERROR(CheckRange(kOp, "workspace.intermediate", p.workspace->intermediate(),
                             p.table->intermediate(), p.table->intermediate()));
  RETURN_IF_ERROR(CheckPointer(kOp, "row_offsets", p.row_offsets, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "x_codes", p.x_codes, 16));
  RETURN_IF_ERROR(CheckPointer(kOp, "x_scales", p.x_scales, 4));
  return with_down ? CheckPointer(kOp, "out", p.out, 16) : absl::OkStatus();
}

absl::Status Launch(const GroupedFfnParams& p, bool with_down, cudaStream_t stream) {
  if (p.rows_max == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p, with_down));
  if (p.num_experts == 0) return absl::OkStatus();
  Args args;
  args.experts = p.table->entries() + p.first_expert;
  args.num_experts = static_cast<int>(p.num_experts);
  args.row_offsets = p.row_offsets;
  args.rows_max = static_cast<int>(p.rows_max);
  args.hidden = static_cast<int>(p.table->hidden());
  args.intermediate = static_cast<int>(p.table->intermediate());
  args.x_codes = reinterpret_cast<const uint8_t*>(p.x_codes);
  args.x_scales = p.x_scales;
  args.row_index = p.row_index;
  args.inner_codes = reinterpret_cast<uint8_t*>(p.workspace->codes());
  args.inner_scales = p.workspace->scales();
  args.counters = p.workspace->counters();
  args.out = reinterpret_cast<uint16_t*>(p.out);
  args.power_of_two_scales = p.power_of_two_scales;
  args.with_down = with_down;
  constexpr int kBytes = static_cast<int>(sizeof(Shared)) + 1024;
  RETURN_IF_ERROR(ToStatus(
      cudaFuncSetAttribute(ExpertFfn, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), kOp));
  ExpertFfn<<<static_cast<unsigned>(MultiprocessorCount()), kThreads, kBytes, stream>>>(args);
  return LaunchStatus(kOp);
}

}  // namespace

absl::Status LaunchExpertFfn(const GroupedFfnParams& params, cudaStream_t stream) {
  return Launch(params, true, stream);
}

absl::Status LaunchExpertGateUp(const GroupedFfnParams& params, cudaStream_t stream) {
  return Launch(params, false, stream);
}

}  // namespace moebius::kernels::cuda
