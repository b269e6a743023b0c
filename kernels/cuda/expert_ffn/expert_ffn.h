#pragma once

// The routed experts of one MoE layer on block-scaled FP8 (kernels/moe.h, ExpertFfnParams):
// out = down(requantise(bf16(silu(x gate^T) * (x up^T)))) for the rows of each expert; DeepSeek-V3
// report section 3.3.2 for the scales, weights as they lie in the checkpoint. One launch: the
// gather of rows, both products, SwiGLU and the quantiser. Counts of rows are read on the device.
//
// An output element is a function of its own row, in an order that depends on (hidden,
// intermediate) alone. K ascending in 128-blocks, not split: from zero, part = 4 wgmma of k32, acc
// = fma(scale_x * scale_w, part, acc) in float32. gate and up stay float32 until their product is
// rounded to BF16; that is quantised 1x128 as kernels/moe.h says (QuantizeRowsParams). Rows are
// operand B of a tile of few and operand A of a tile of many; which, and how many share a tile,
// follows the counts and does not reach the bits (docs/adr/0011, 0013).

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"
#include "kernels/cuda/expert_ffn/expert_table.h"
#include "kernels/cuda/expert_ffn/expert_workspace.h"

namespace moebius::kernels::cuda {

// Device pointers, borrowed until the stream has passed the launch.
struct GroupedFfnParams {
  const ExpertTable* table = nullptr;
  int64_t first_expert = 0;              // experts [first, first + num_experts) of the table
  int64_t num_experts = 0;               // at most 512
  const int32_t* row_offsets = nullptr;  // [num_experts + 1] ascending from 0: packed rows of
                                         // expert e are [row_offsets[e], row_offsets[e + 1])
  int64_t rows_max = 0;                  // row_offsets[num_experts] is at most this; 0 does nothing
  const E4m3* x_codes = nullptr;         // [source rows, hidden], 16-aligned
  const float* x_scales = nullptr;       // [source rows, ceil(hidden / 128)]
  const int32_t* row_index = nullptr;  // [rows_max] source row of each packed row; nullptr: itself
  bool power_of_two_scales = false;    // of the requantised SwiGLU output
  Bf16* out = nullptr;                 // [rows_max, hidden] in packed order, 16-aligned; not in use
                                       // by LaunchExpertGateUp
  const ExpertWorkspace* workspace = nullptr;
};

// Enqueues on `stream`. Rows of `out` from row_offsets[num_experts] on are left as they are.
// Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails. Any thread.
absl::Status LaunchExpertFfn(const GroupedFfnParams& params, cudaStream_t stream);

// Only the first half, up to the requantised rows in the workspace: for measurements.
absl::Status LaunchExpertGateUp(const GroupedFfnParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
