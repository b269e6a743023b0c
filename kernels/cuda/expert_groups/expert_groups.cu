#include <cstdint>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/expert_groups/expert_groups.h"

namespace moebius::kernels::cuda {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
// No expert: beyond every id that is counted, and equal to none.
constexpr uint32_t kNone = 0xffffffffu;

struct Args {
  const uint32_t* experts;
  int pairs, top_k, num_experts;
  int32_t* expert_offsets;
  int32_t* row_index;
  int32_t* packed_rows;
};

// One CTA an expert, each warp a stretch of the pairs. A first pass counts pairs of lower experts
// (their number is this expert's offset) and of this one; a second pass places the latter.
// kUnroll: how many pairs a lane loads at once.
template <int kWarps, int kUnroll>
__global__ void __launch_bounds__(32 * kWarps) ExpertGroups(const Args args) {
  __shared__ int lower_of[kWarps], own_of[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t expert = blockIdx.x;
  const int chunk = 32 * kUnroll;
  const int stretch = ((args.pairs + kWarps - 1) / kWarps + chunk - 1) / chunk * chunk;
  const int begin = min(args.pairs, warp * stretch), end = min(args.pairs, begin + stretch);
  // The ids of pairs base + 32 u + lane; past the end of the stretch, none.
  const auto load = [&](int base, uint32_t(&id)[kUnroll]) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + 32 * u + lane;
      id[u] = i < end ? args.experts[i] : kNone;
    }
  };
  WaitForPrecedingKernel();
  // The next kernel's CTAs would be in the way of this one's if there are many.
  if (kWarps <= 8) LetNextKernelStart();

  int lower = 0, own = 0;
  for (int base = begin; base < end; base += chunk) {
    uint32_t id[kUnroll];
    load(base, id);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      lower += id[u] < expert;
      own += id[u] == expert;
    }
  }
  lower = __reduce_add_sync(kAllLanes, lower);
  own = __reduce_add_sync(kAllLanes, own);
  if (lane == 0) {
    lower_of[warp] = lower;
    own_of[warp] = own;
  }
  __syncthreads();
  int offset = 0, total = 0, at = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    offset += lower_of[w];
    total += own_of[w];
    at += w < warp ? own_of[w] : 0;
  }
  at += offset;
  if (threadIdx.x == 0) {
    args.expert_offsets[expert] = offset;
    if (expert + 1 == static_cast<uint32_t>(args.num_experts))
      args.expert_offsets[expert + 1] = offset + total;
  }
  if (own == 0) return;

  for (int base = begin; base < end; base += chunk) {
    uint32_t id[kUnroll];
    load(base, id);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t holders = __ballot_sync(kAllLanes, id[u] == expert);
      if (id[u] == expert) {
        const int i = base + 32 * u + lane;
        const int row = at + __popc(holders & ((1u << lane) - 1u));
        args.row_index[row] = i / args.top_k;
        if (args.packed_rows != nullptr) args.packed_rows[i] = row;
      }
      at += __popc(holders);
    }
  }
}

absl::Status Validate(const ExpertGroupsParams& p) {
  constexpr const char* kOp = "ExpertGroups";
  RETURN_IF_ERROR(CheckRange(kOp, "top_k", p.top_k, 1, 64));
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, (INT32_MAX / 2) / p.top_k));
  RETURN_IF_ERROR(CheckRange(kOp, "num_experts", p.num_experts, 1, kExpertGroupsMaxExperts));
  RETURN_IF_ERROR(CheckPointer(kOp, "expert_offsets", p.expert_offsets, 4));
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CheckPointer(kOp, "experts", p.experts, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "row_index", p.row_index, 4));
  return p.packed_rows == nullptr ? absl::OkStatus()
                                  : CheckPointer(kOp, "packed_rows", p.packed_rows, 4);
}

template <int kWarps, int kUnroll>
absl::Status Launch(const ExpertGroupsParams& p, cudaStream_t stream) {
  const Args args{reinterpret_cast<const uint32_t*>(p.experts),
                  static_cast<int>(p.m * p.top_k),
                  p.top_k,
                  p.num_experts,
                  p.expert_offsets,
                  p.row_index,
                  p.packed_rows};
  return LaunchDependent("ExpertGroups", ExpertGroups<kWarps, kUnroll>,
                         dim3(static_cast<unsigned>(p.num_experts)), 32 * kWarps, stream, args);
}

}  // namespace

absl::Status LaunchExpertGroups(const ExpertGroupsParams& params, cudaStream_t stream) {
  RETURN_IF_ERROR(Validate(params));
  static_assert(sizeof(ExpertId) == sizeof(uint32_t), "ids are read as integers");
  if (params.m * params.top_k <= 2048) return Launch<8, 4>(params, stream);
  return Launch<16, 16>(params, stream);
}

}  // namespace moebius::kernels::cuda
