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

// Where one copy of a row goes. Codes that begin at a multiple of 16 bytes are fast, of 8 nearly
// so.
struct RowCopy {
  E4m3* codes = nullptr;    // [dim]
  float* scales = nullptr;  // [ceil(dim / 128)]
};

// Quantises every row once and writes it to each of its places, all of them in device memory:
//   for c in [copy_begin[i], copy_begin[i + 1]):  copies[c] = quantised x[i]
// A token is sent once to a destination, however many of its experts live there; the caller's
// copies say so. Rows without copies cost nothing. No two copies name the same place.
struct DispatchRowsParams {
  int64_t m = 0;
  int64_t dim = 0;
  const Bf16* x = nullptr;  // [m, dim], row stride x_stride elements
  int64_t x_stride = 0;
  const int32_t* copy_begin = nullptr;  // [m + 1], ascending from 0
  const RowCopy* copies = nullptr;      // [copy_begin[m]], 16-aligned
  bool power_of_two_scales = false;
};

// Both enqueue on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch
// fails. Any thread.
absl::Status LaunchQuantizeRows(const QuantizeRowsParams& params, cudaStream_t stream);
absl::Status LaunchDispatchRows(const DispatchRowsParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
