#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/expert_groups/expert_groups.h"

namespace moebius::kernels::cuda {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
// No expert: beyond every id that is counted, and equal to none.
constexpr uint32_t kNone = 0xffffffffu;

// One CTA for kExperts experts, each warp a stretch of the pairs. A first pass counts pairs of
// lower experts (their number is the first one's offset) and of its own; a second pass places the
// latter. kUnroll: how many pairs a lane loads at once.
template <int kWarps, int kUnroll, int kExperts>
__global__ void __launch_bounds__(32 * kWarps)
    ExpertGroups(const uint32_t* experts, int pairs, int top_k, int num_experts,
                 int32_t* expert_offsets, int32_t* row_index, int32_t* packed_rows) {
  __shared__ int counts[1 + kExperts][kWarps];  // of lower experts, then of each own
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t first = blockIdx.x * kExperts;
  const int chunk = 32 * kUnroll;
  const int stretch = ((pairs + kWarps - 1) / kWarps + chunk - 1) / chunk * chunk;
  const int begin = min(pairs, warp * stretch), end = min(pairs, begin + stretch);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  // The next kernel's CTAs would be in the way of this one's if there are many.
  if (kWarps <= 8) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  // Calls each(pair, id) for the pairs of a warp, in order, 32 at a time.
  const auto for_pairs = [&](const auto& each) {
    for (int base = begin; base < end; base += chunk) {
      uint32_t id[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = base + 32 * u + lane;
        id[u] = i < end ? experts[i] : kNone;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) each(base + 32 * u + lane, id[u]);
    }
  };
  int lower = 0, own[kExperts] = {};
  for_pairs([&](int, uint32_t id) {
    lower += id < first;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) own[e] += id == first + e;
  });
  lower = __reduce_add_sync(kAllLanes, lower);
  if (lane == 0) counts[0][warp] = lower;
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
    own[e] = __reduce_add_sync(kAllLanes, own[e]);
    if (lane == 0) counts[1 + e][warp] = own[e];
  }
  __syncthreads();
  int offset = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) offset += counts[0][w];
  int at[kExperts];  // of this warp's next pair
  bool any = false;
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
    const int expert = static_cast<int>(first) + e;
    if (threadIdx.x == 0 && expert <= num_experts) expert_offsets[expert] = offset;
    at[e] = offset;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      at[e] += w < warp ? counts[1 + e][w] : 0;
      offset += expert < num_experts ? counts[1 + e][w] : 0;
    }
    any = any || (own[e] > 0 && expert < num_experts);
  }
  const int next = static_cast<int>(first) + kExperts;
  if (threadIdx.x == 0 && next == num_experts) expert_offsets[num_experts] = offset;
  if (!any) return;

  for_pairs([&](int i, uint32_t id) {
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const bool mine = id == first + e && static_cast<int>(id) < num_experts;
      const uint32_t holders = __ballot_sync(kAllLanes, mine);
      if (mine) {
        const int row = at[e] + __popc(holders & ((1u << lane) - 1u));
        row_index[row] = i / top_k;
        if (packed_rows != nullptr) packed_rows[i] = row;
      }
      at[e] += __popc(holders);
    }
  });
}

absl::Status Validate(const ExpertGroupsParams& p) {
  const auto refuse = [](const char* field, int64_t value, const char* rule) {
    return absl::InvalidArgumentError(
        absl::StrCat("ExpertGroups: ", field, " is ", value, ", must be ", rule));
  };
  if (p.top_k < 1 || p.top_k > 64) return refuse("top_k", p.top_k, "1 .. 64");
  if (p.m < 0 || p.m > (INT32_MAX / 2) / p.top_k) return refuse("m", p.m, "0 .. 2^30 / top_k");
  if (p.num_experts < 1 || p.num_experts > kExpertGroupsMaxExperts)
    return refuse("num_experts", p.num_experts, "1 .. 4096");
  const auto missing = [](const char* field) {
    return absl::InvalidArgumentError(absl::StrCat("ExpertGroups: ", field, " is null"));
  };
  if (p.m > 0 && p.experts == nullptr) return missing("experts");
  if (p.expert_offsets == nullptr) return missing("expert_offsets");
  if (p.m > 0 && p.row_index == nullptr) return missing("row_index");
  return absl::OkStatus();
}

template <int kWarps, int kUnroll, int kExperts>
absl::Status Launch(const ExpertGroupsParams& p, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((p.num_experts + kExperts - 1) / kExperts));
  config.blockDim = dim3(32 * kWarps);
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return ToStatus(cudaLaunchKernelEx(&config, ExpertGroups<kWarps, kUnroll, kExperts>,
                                     reinterpret_cast<const uint32_t*>(p.experts),
                                     static_cast<int>(p.m * p.top_k), static_cast<int>(p.top_k),
                                     static_cast<int>(p.num_experts), p.expert_offsets, p.row_index,
                                     p.packed_rows),
                  "ExpertGroups");
}

}  // namespace

absl::Status LaunchExpertGroups(const ExpertGroupsParams& params, cudaStream_t stream) {
  RETURN_IF_ERROR(Validate(params));
  static_assert(sizeof(ExpertId) == sizeof(uint32_t), "ids are read as integers");
  if (params.m * params.top_k <= 2048) return Launch<8, 4, 1>(params, stream);
  // Several experts a CTA: all CTAs read all pairs.
  return Launch<16, 16, 4>(params, stream);
}

}  // namespace moebius::kernels::cuda
