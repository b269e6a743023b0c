#pragma once

// A block-scaled FP8 weight (128x128 blocks, DeepSeek-V3 report section 3.3.2) to BF16, once at the
// start: kv_b, which absorbed attention multiplies in BF16. out = bf16(value(code) * scale), the
// product in float32: the bits of DequantizeMatrix (model/quantize.h) for any scale, subnormal
// products and infinities too. A NaN code gives the quiet NaN of its sign; the sign of a NaN that
// comes from a scale follows the machine.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

// Device pointers, borrowed until the stream has passed the launch. Rows of a multiple of 8 codes,
// `weight` 8-aligned and `out` 16-aligned, are fast; all others are allowed.
//
// `out` becomes a constant of the model. Kernels that take weights as such (bf16_linear) may fetch
// them before the kernel in front has ended, this one too: synchronise the stream once between it
// and the first of them.
struct DequantizeWeightParams {
  int64_t n = 0;                         // rows; 0 does nothing
  int64_t k = 0;                         // columns; 0 does nothing
  const E4m3* weight = nullptr;          // [n, k] dense
  const float* weight_scales = nullptr;  // [ceil(n / 128), ceil(k / 128)] dense
  Bf16* out = nullptr;                   // [n, k] dense
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchDequantizeWeight(const DequantizeWeightParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
