#include "kernels/cuda/expert_ffn/expert_ffn.h"

#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
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
constexpr int kStageScales = 2 * kTileRows;  // scale of row * scale of weights, for either matrix
constexpr int kStages = (202 * 1024) / kStageBytes;
constexpr int kScalesAhead = 8;  // blocks whose scales are on their way before they are multiplied
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
  float raw_scales[kScalesAhead][kTileRows + 2];  // of rows; of the two weight blocks
  uint64_t full[kStages], empty[kStages];
  uint64_t announced[kTileEntries], taken[kTileEntries];
  ExpertTile tiles[kTileEntries];
  TileList list;
  int32_t last;
};
static_assert(sizeof(Shared) <= 227 * 1024, "a CTA has 227 KB of shared memory");

__device__ __forceinline__ int Blocks(int size) { return (size + kTileK - 1) / kTileK; }

// Of unsigned factors: one instruction.
__device__ __forceinline__ uint64_t ElementOffset(int row, int width, int column) {
  return static_cast<uint64_t>(static_cast<uint32_t>(row)) * static_cast<uint32_t>(width) +
         static_cast<uint32_t>(column);
}

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
    if (ThreadRead() % 32 == 0) BarrierArrive(&shared.taken[entry]);
    ++count_;
    return tile;
  }

 private:
  uint32_t count_ = 0;
};

// Copies 16 bytes asynchronously, the first `bytes` from memory, zeros after them.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CopyFloatAsync(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
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
#pragma unroll 1
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

// Warp `part` of kRowWarps: gathers the codes of the tile's rows. Rows of a stage beyond the tile's
// keep what was there: their columns of the product are not stored, and no other sees them.
__device__ __forceinline__ void LoadRows(const Args& args, Shared& shared, int part) {
  constexpr int kAtOnce = kRowWarps * 32 / 8;  // rows; 8 threads copy one
  StageCursor cursor;
  TileReader reader;
  for (;;) {
    const ExpertTile tile = reader.Next(shared);
    if (tile.kind == TileKind::kStop) return;
    const int thread = part * 32 + ThreadRead() % 32;
    const int chunk = thread % 8, row_of_thread = thread / 8;
    const uint32_t place = kWeightBytes + row_of_thread * kTileK + (chunk ^ row_of_thread % 8) * 16;
    const bool down = tile.kind == TileKind::kDown;
    if (down) WaitForRows(args, tile);
    const int width = down ? args.intermediate : args.hidden;
    const uint8_t* codes = (down ? args.inner_codes : args.x_codes) + chunk * 16;
    const int copies = (tile.rows - row_of_thread + kAtOnce - 1) / kAtOnce;
    uint32_t offset[kTileRows / kAtOnce];  // in 16 bytes
#pragma unroll
    for (int i = 0; i < kTileRows / kAtOnce; ++i) {
      const int row = tile.row + min(row_of_thread + i * kAtOnce, tile.rows - 1);
      offset[i] =
          static_cast<uint32_t>(SourceRow(args, down, row)) * static_cast<uint32_t>(width / 16);
    }
#pragma unroll 1
    for (int left = width - chunk * 16; left > -chunk * 16; left -= kTileK) {
      const int s = cursor.stage;
      BarrierWait(&shared.empty[s], cursor.parity ^ 1);
      const uint32_t to = SharedAddress(shared.stages[s]) + place;
      const int bytes = left > 0 ? 16 : 0;  // 0: zeros, and the address is not used
#pragma unroll
      for (int i = 0; i < kTileRows / kAtOnce; ++i) {
        if (i >= copies) break;
        CopyAsync(to + i * kAtOnce * kTileK, codes + static_cast<uint64_t>(offset[i]) * 16, bytes);
      }
      ArriveAfterCopies(&shared.full[s]);
      codes += kTileK;
      cursor.Advance();
    }
  }
}

// Where the scale of a row lies among a stage's: a thread that holds columns 8 j + 2 q and the next
// of the product (device/wgmma.cuh) finds those of j and j + 1 side by side.
__device__ __forceinline__ int ScalePlace(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}

// One warp: the products of the scales of the tile's rows and of its two weight matrices.
__device__ __forceinline__ void LoadScales(const Args& args, Shared& shared) {
  constexpr int kRows = kTileRows / 32;  // of a lane
  const int lane = ThreadRead() % 32;
  StageCursor cursor;
  TileReader reader;
  for (;;) {
    const ExpertTile tile = reader.Next(shared);
    if (tile.kind == TileKind::kStop) return;
    const bool down = tile.kind == TileKind::kDown;
    if (down) WaitForRows(args, tile);
    const int blocks = Blocks(down ? args.intermediate : args.hidden);
    const float* const scales = down ? args.inner_scales : args.x_scales;
    uint32_t offset[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = tile.row + min(lane + 32 * i, tile.rows - 1);
      offset[i] = static_cast<uint32_t>(SourceRow(args, down, row)) * static_cast<uint32_t>(blocks);
    }
    // Lane 0 reads the first matrix', lane 1 the second's. The second of down may lie beyond
    // its end, where any scale does.
    const ExpertEntry& expert = args.experts[tile.expert];
    const int last_column = Blocks(down ? args.hidden : args.intermediate) - 1;
    const int column = min(tile.column / kTileColumns + (down ? lane % 2 : 0), last_column);
    const float* const weights = (down            ? expert.down_scales
                                  : lane % 2 == 0 ? expert.gate_scales
                                                  : expert.up_scales) +
                                 static_cast<int64_t>(column) * blocks;
    const int used = (tile.rows + 31) / 32;
    // Under load an answer from L2 takes as long as two blocks last.
    const auto fetch = [&](int block) {
      if (block < blocks) {
        float* const to = shared.raw_scales[block % kScalesAhead];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i < used)
            CopyFloatAsync(to + lane + 32 * i, scales + (offset[i] + static_cast<uint32_t>(block)));
        }
        if (lane < 2) CopyFloatAsync(to + kTileRows + lane, weights + block);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll 1
    for (int block = 0; block < kScalesAhead; ++block) fetch(block);
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kScalesAhead - 1) : "memory");
      __syncwarp();
      const float* const raw = shared.raw_scales[block % kScalesAhead];
      const float first = raw[kTileRows], second = raw[kTileRows + 1];
      float product[kRows][2];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float of_row = raw[lane + 32 * i];
        product[i][0] = __fmul_rn(of_row, first);
        product[i][1] = __fmul_rn(of_row, second);
      }
      __syncwarp();  // everybody has read what is overwritten now
      fetch(block + kScalesAhead);
      const int s = cursor.stage;
      BarrierWait(&shared.empty[s], cursor.parity ^ 1);
      float* const to = shared.scales[s] + ScalePlace(lane);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= used) continue;
        to[32 * i] = product[i][0];
        to[32 * i + kTileRows] = product[i][1];
      }
      BarrierArrive(&shared.full[s]);
      cursor.Advance();
    }
  }
}

// Low halves of KMajorDescriptor; 32 bytes of K further is 2 more.
constexpr uint64_t kDescriptorHigh = 0x40000040ull << 32;

template <int kWidth>
__device__ __forceinline__ void IssueBlock(float (&part)[kWidth / 2], uint32_t weights,
                                           uint32_t rows) {
#pragma unroll
  for (int step = 0; step < kTileK / 32; ++step) {
    WgmmaInstruction<E4m3Operands, kWidth>::Shared(part, kDescriptorHigh | (weights + 2 * step),
                                                   kDescriptorHigh | (rows + 2 * step), step != 0);
  }
  WgmmaCommit();
}

// sum = fma(scale, part, sum); scales as ScalePlace puts them.
template <int kWidth>
__device__ __forceinline__ void AddScaled(float (&sum)[kWidth / 2], const float (&part)[kWidth / 2],
                                          const float* scales) {
  const float* const mine = scales + ThreadRead() % 4 * 4;
#pragma unroll
  for (int j = 0; j < kWidth / 8; j += 2) {
    float scale[4];
    *reinterpret_cast<float4*>(scale) = *reinterpret_cast<const float4*>(mine + 8 * j);
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 8 && i < kWidth / 2; ++i)
      sum[i] = __fmaf_rn(scale[(i - 4 * j) / 4 * 2 + i % 2], part[i], sum[i]);
  }
}

// Both products of a tile for this warpgroup's 64 columns of either matrix. `weights` and `rows`:
// descriptors in the first stage.
template <int kWidth>
__device__ __forceinline__ void MultiplyTile(Shared& shared, StageCursor& cursor, uint32_t weights,
                                             uint32_t rows, int blocks, float (&first)[kWidth / 2],
                                             float (&second)[kWidth / 2]) {
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) first[i] = second[i] = 0.0f;
  for (int block = 0; block < blocks; ++block) {
    const int s = cursor.stage;
    const uint32_t stage = static_cast<uint32_t>(s) * (kStageBytes / 16);
    constexpr uint32_t kSecond = kWeightBytes / 2 / 16;
    const float* const scales = shared.scales[s];
    BarrierWait(&shared.full[s], cursor.parity);
    ProxyFence();  // rows came by ordinary asynchronous copies
    float part[kWidth / 2];
    WgmmaFence();
    IssueBlock<kWidth>(part, weights + stage, rows + stage);
    if constexpr (kWidth <= 64) {
      float other[kWidth / 2];
      IssueBlock<kWidth>(other, weights + stage + kSecond, rows + stage);
      WgmmaWait<1>();
      KeepRegisters(part);
      AddScaled<kWidth>(first, part, scales);
      WgmmaWait<0>();
      KeepRegisters(other);
      AddScaled<kWidth>(second, other, scales + kTileRows);
    } else {
      WgmmaWait<0>();
      KeepRegisters(part);
      AddScaled<kWidth>(first, part, scales);
      WgmmaFence();
      IssueBlock<kWidth>(part, weights + stage + kSecond, rows + stage);
      WgmmaWait<0>();
      KeepRegisters(part);
      AddScaled<kWidth>(second, part, scales + kTileRows);
    }
    __syncwarp();
    if (ThreadRead() % 32 == 0) BarrierArrive(&shared.empty[s]);
    cursor.Advance();
  }
}

template <int kWidth>
__device__ __forceinline__ void ComputeTile(const Args& args, Shared& shared, StageCursor& cursor,
                                            const ExpertTile& tile) {
  const bool down = tile.kind == TileKind::kDown;
  float first[kWidth / 2], second[kWidth / 2];
  // The same in all lanes, and said so: the descriptors then live in uniform registers.
  const int group = __shfl_sync(0xffffffffu, ThreadRead() / 128, 0);
  const uint32_t stage = SharedAddress(shared.stages[0]);
  MultiplyTile<kWidth>(shared, cursor,
                       static_cast<uint32_t>(KMajorDescriptor(stage + group * 64 * kTileK)),
                       static_cast<uint32_t>(KMajorDescriptor(stage + kWeightBytes)),
                       Blocks(down ? args.intermediate : args.hidden), first, second);
  if (down) {
    const auto store = [&](int first_column) {
      return [&, first_column](int row, int lane_of_row, const RowVector& v) {
        const int column = first_column + lane_of_row * kVectorElements;
        if (row >= tile.rows || column >= args.hidden) return;
        StoreVector<true>(v, args.out + ElementOffset(tile.row + row, args.hidden, column), 0, 8);
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
    const int column = tile.column + lane_of_row * kVectorElements;
    if (column >= args.intermediate) return;
    StoreCodes<true>(CodesOfVector(v, scale),
                     args.inner_codes + ElementOffset(tile.row + row, args.intermediate, column), 0,
                     8);
    if (lane_of_row == 0) {
      args.inner_scales[ElementOffset(tile.row + row, Blocks(args.intermediate),
                                      tile.column / kTileColumns)] = scale.scale;
    }
  });
  if (ThreadRead() == 0) {
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
    } else if (tile.rows <= 48) {
      ComputeTile<48>(args, shared, cursor, tile);
    } else if (tile.rows <= 64) {
      ComputeTile<64>(args, shared, cursor, tile);
    } else if (tile.rows <= 96) {
      ComputeTile<96>(args, shared, cursor, tile);
    } else {
      ComputeTile<128>(args, shared, cursor, tile);
    }
  }
}

// Persistent, one CTA a multiprocessor: warpgroups 0 and 1 multiply; the warps of the third load.
__global__ void __launch_bounds__(kThreads, 1) ExpertFfn(const Args args) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  if (SharedAddress(shared_memory) % 1024 != 0) __trap();  // what swizzling and Shared rely on
  if (ThreadRead() == 0) {
    for (int s = 0; s < kStages; ++s) {
      BarrierInit(&shared.full[s], 1 + kRowWarps * 32 + 32);  // the copy engine's and each loader's
      BarrierInit(&shared.empty[s], kConsumers / 32);
    }
    for (int entry = 0; entry < kTileEntries; ++entry) {
      BarrierInit(&shared.announced[entry], 1);
      BarrierInit(&shared.taken[entry], kTileReaders);
    }
    BarrierInitFence();
  }
  LetNextKernelStart();
  WaitForPrecedingKernel();
  shared.list.Build(args.row_offsets, args.num_experts, args.rows_max);  // with a barrier

  if (ThreadRead() >= kConsumers) {
    RegistersDown<kLoaderRegisters>();
    const int warp = (ThreadRead() - kConsumers) / 32;
    if (warp == 0) {
      if (ThreadRead() % 32 == 0) LoadWeights(args, shared);
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
  if (ThreadRead() == 0) {
    __threadfence();
    const int before = atomicAdd(args.counters + kCounterDone, 1);
    shared.last = before == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (shared.last == 0) return;
  const int row_tiles = shared.list.row_tiles[args.num_experts];
#pragma unroll 1
  for (int i = ThreadRead(); i < row_tiles; i += kThreads) args.counters[kCounterTiles + i] = 0;
  if (ThreadRead() == 0) args.counters[kCounterTicket] = args.counters[kCounterDone] = 0;
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
  constexpr int kBytes = static_cast<int>(sizeof(Shared));
  RETURN_IF_ERROR(ToStatus(
      cudaFuncSetAttribute(ExpertFfn, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), kOp));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(MultiprocessorCount()));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return ToStatus(cudaLaunchKernelEx(&config, ExpertFfn, args), kOp);
}

}  // namespace

absl::Status LaunchExpertFfn(const GroupedFfnParams& params, cudaStream_t stream) {
  return Launch(params, true, stream);
}

absl::Status LaunchExpertGateUp(const GroupedFfnParams& params, cudaStream_t stream) {
  return Launch(params, false, stream);
}

}  // namespace moebius::kernels::cuda
