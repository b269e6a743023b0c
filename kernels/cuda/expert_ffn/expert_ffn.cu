#include "kernels/cuda/expert_ffn/expert_ffn.h"

#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/expert_ffn/cta_state.cuh"
#include "kernels/cuda/expert_ffn/tile_loaders.cuh"
#include "kernels/cuda/expert_ffn/tile_product.cuh"

namespace moebius::kernels::cuda {
namespace {

// Persistent, one CTA a multiprocessor: warpgroups 0 and 1 multiply; the warps of the third load.
__global__ void __launch_bounds__(kThreads, 1) ExpertFfn(const __grid_constant__ FfnArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  FfnShared& shared = *reinterpret_cast<FfnShared*>(shared_memory);
  if (SharedAddress(shared_memory) % 1024 != 0) __trap();  // what swizzling and FfnShared rely on
  if (ThreadRead() == 0) {
    for (int s = 0; s < kStages; ++s) {
      BarrierInit(&shared.full[s], 1 + kRowWarps * 32 + 32);  // the copy engine's and each loader's
      BarrierInit(&shared.empty[s], kConsumers / 32);
    }
    for (int entry = 0; entry < kTileEntries; ++entry) {
      BarrierInit(&shared.announced[entry], 1);
      BarrierInit(&shared.taken[entry], kTileReaders);
    }
    BarrierInit(&shared.stored, kConsumers / 32);
    shared.uncounted = -1;
    BarrierInitFence();
  }
  LetNextKernelStart();
  WaitForPrecedingKernel();
  // The weight loader's first ticket, asked for now because the answer takes a while.
  int ticket = 0;
  if (ThreadRead() == kConsumers) ticket = atomicAdd(args.counters + kCounterTicket, 1);
  shared.list.Build(args.row_offsets, args.num_experts, args.rows_max,
                    Blocks(args.intermediate));  // with a barrier

  if (ThreadRead() >= kConsumers) {
    RegistersDown<kLoaderRegisters>();
    const int warp = (ThreadRead() - kConsumers) / 32;
    if (warp == 0) {
      if (ThreadRead() % 32 == 0) LoadWeights(args, shared, ticket);
      __syncwarp();
    } else if (warp <= kRowWarps) {
      LoadRows(args, shared);
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
  if (shared.list.lead > 0) {
#pragma unroll 1
    for (int i = ThreadRead(); i < shared.list.slots[args.num_experts] * kGatheredWords;
         i += kThreads)
      args.gathered[i] = 0;
  }
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
  RETURN_IF_ERROR(CheckRange(kOp, "workspace.hidden", p.workspace->hidden(), p.table->hidden(),
                             p.table->hidden()));
  RETURN_IF_ERROR(CheckPointer(kOp, "row_offsets", p.row_offsets, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "x_codes", p.x_codes, 16));
  RETURN_IF_ERROR(CheckPointer(kOp, "x_scales", p.x_scales, 4));
  return with_down ? CheckPointer(kOp, "out", p.out, 16) : absl::OkStatus();
}

absl::Status Launch(const GroupedFfnParams& p, bool with_down, cudaStream_t stream) {
  if (p.rows_max == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p, with_down));
  if (p.num_experts == 0) return absl::OkStatus();
  FfnArgs args;
  MatrixMap map;
  map.base = p.workspace->codes();
  map.rows = static_cast<uint64_t>(p.workspace->rows_max());
  map.cols = map.row_stride_bytes = static_cast<uint64_t>(p.workspace->intermediate());
  map.box_rows = kBoxRows;
  map.box_cols = kTileK;
  ASSIGN_OR_RETURN(args.inner_rows, EncodeMatrixMap(map));
  map.base = p.workspace->gathered_codes();
  map.rows = static_cast<uint64_t>(p.workspace->gathered_rows_max());
  map.cols = map.row_stride_bytes = static_cast<uint64_t>(p.table->hidden());
  map.box_rows = kHalfRows;
  ASSIGN_OR_RETURN(args.gathered_rows, EncodeMatrixMap(map));
  args.gathered_scales = p.workspace->gathered_scales();
  args.gathered = p.workspace->gathered();
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
  constexpr int kBytes = static_cast<int>(sizeof(FfnShared));
  return LaunchDependent(kOp, ExpertFfn, dim3(static_cast<unsigned>(MultiprocessorCount())),
                         kThreads, stream, args, kBytes);
}

}  // namespace

absl::Status LaunchExpertFfn(const GroupedFfnParams& params, cudaStream_t stream) {
  return Launch(params, true, stream);
}

absl::Status LaunchExpertGateUp(const GroupedFfnParams& params, cudaStream_t stream) {
  return Launch(params, false, stream);
}

}  // namespace moebius::kernels::cuda
