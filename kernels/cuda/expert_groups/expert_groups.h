#pragma once

// Sorts a batch's (token, slot) pairs by expert, on the device: what the grouped expert FFN needs
// between the gate's choice and its first GEMM, without the counts ever reaching the host.
//
// Packed order: expert ascending, then token ascending (then slot ascending). Every position is
// counted, none is taken from an atomic counter, so the order is a function of `experts` alone.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/ids.h"

namespace moebius::kernels::cuda {

inline constexpr int32_t kExpertGroupsMaxExperts = 4096;

// Device pointers, borrowed until the stream has passed the launch.
struct ExpertGroupsParams {
  int64_t m = 0;
  int32_t top_k = 0;
  int32_t num_experts = 0;
  const ExpertId* experts = nullptr;  // [m, top_k]; an id >= num_experts takes no packed row
  int32_t* expert_offsets = nullptr;  // [num_experts + 1] out: expert e has packed rows
                                      // [offsets[e], offsets[e + 1])
  int32_t* row_index = nullptr;       // [m * top_k] out: the token of packed row i; rows from
                                      // expert_offsets[num_experts] on are left as they are
  int32_t* packed_rows = nullptr;  // [m, top_k] out, or nullptr: the packed row of (token, slot);
                                   // slots without one are left as they are
};

// Enqueues on `stream`. m = 0 writes the offsets (all 0). Errors: INVALID_ARGUMENT naming the
// field; INTERNAL if the launch fails. Any thread.
absl::Status LaunchExpertGroups(const ExpertGroupsParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
