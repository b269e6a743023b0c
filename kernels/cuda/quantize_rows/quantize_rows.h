#pragma once

// 1x128 quantisation of BF16 rows (kernels/moe.h, QuantizeRowsParams; DeepSeek-V3 report section
// 3.3.2), for a GEMM on this device and for the rows that go to experts elsewhere. Codes and scales
// are bit-equal to kernels/reference; a row with a NaN or infinity spoils its own block only.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

// All pointers are device pointers, borrowed until the stream has passed the launch.
struct QuantizeRowsParams {
  int64_t m = 0;            // rows; 0 does nothing
  int64_t dim = 0;          // 1 .. 2^20
  const Bf16* x = nullptr;  // [m or more, dim], row stride x_stride elements
  int64_t x_stride = 0;
  const int32_t* row_index = nullptr;  // [m] row of x that output row i reads; nullptr = i
  E4m3* codes = nullptr;               // [m, dim] dense
  float* scales = nullptr;             // [m, ceil(dim / 128)] dense
  bool power_of_two_scales = false;
};

// Where the rows of one destination are gathered: a frame that is sent as it lies. Rows of codes
// that begin at multiples of 8 bytes are fast.
struct DispatchTarget {
  E4m3* codes = nullptr;  // [rows, dim], row stride code_stride bytes
  int64_t code_stride = 0;
  float* scales = nullptr;  // [rows, ceil(dim / 128)], row stride scale_stride elements
  int64_t scale_stride = 0;
};

// One copy of a row.
struct DispatchEntry {
  int32_t target = 0;  // which DispatchTarget
  int32_t row = 0;     // its row there
};

// Quantises every row once and writes it to each of its places:
//   for e in [entry_begin[i], entry_begin[i + 1]):
//     targets[entries[e].target] row entries[e].row = quantised x[i]
// A token is sent once to a destination, however many of its experts live there; the caller's
// entries say so. Rows without entries cost nothing. No two entries name the same place.
struct DispatchRowsParams {
  int64_t m = 0;
  int64_t dim = 0;
  const Bf16* x = nullptr;  // [m, dim], row stride x_stride elements
  int64_t x_stride = 0;
  const int32_t* entry_begin = nullptr;     // [m + 1], ascending from 0
  const DispatchEntry* entries = nullptr;   // [entry_begin[m]]
  const DispatchTarget* targets = nullptr;  // [any], device memory
  bool power_of_two_scales = false;
};

// Both enqueue on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch
// fails. Any thread.
absl::Status LaunchQuantizeRows(const QuantizeRowsParams& params, cudaStream_t stream);
absl::Status LaunchDispatchRows(const DispatchRowsParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
