#pragma once

// Linear layers in BF16 (kernels/linear.h, LinearParams): out = x W^T, one product or one a head.
// LM head, gate logits, eh_proj, and both halves of kv_b's absorption (DeepSeek-V2 report section
// 2.1.2, W_UK into the query and W_UV into the output).
//
// An output element is a function of its own row, in an order that depends on (n, k) alone. K is
// cut at multiples of 64 into Bf16LinearSegments(n, k) segments, as equal as these allow (only one
// with several heads); each is one chain of wgmma k16, ascending from zero; segments are added in
// ascending order in float32; one rounding.
// Weights are operand A and token rows operand B for every m; only the number of rows that share a
// tile follows m, which does not reach the bits (docs/adr/0015).

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

// Device pointers, borrowed until the stream has passed the launch. Strides in elements. The weight
// is a constant of the model: it is read before the stream's earlier kernels have ended, so it must
// not be written by them.
struct Bf16LinearParams {
  int64_t m = 0;  // rows; 0 does nothing
  int64_t n = 0;
  int64_t k = 0;      // a multiple of 8; of 64 with more than one head or a transposed weight
  int64_t heads = 1;  // products side by side, each with its own weight

  // Row i of head h: x + i * x_stride + h * x_head_stride, k elements. 16-aligned, x_stride a
  // multiple of 8.
  const Bf16* x = nullptr;
  int64_t x_stride = 0;
  int64_t x_head_stride = 0;

  // [n, k] of head h (transposed: [k, n], n a multiple of 8): weight + h * weight_head_stride, rows
  // weight_stride apart. 16-aligned, weight_stride a multiple of 8, weight_head_stride one of
  // weight_stride.
  const Bf16* weight = nullptr;
  int64_t weight_stride = 0;
  int64_t weight_head_stride = 0;
  bool weight_transposed = false;

  // Exactly one is set. Element j of row i of head h: i * out_stride + h * out_head_stride + j.
  Bf16* out_bf16 = nullptr;
  float* out_f32 = nullptr;
  int64_t out_stride = 0;
  int64_t out_head_stride = 0;
};

// 1, 2, 4 or 8: how many segments K of a single product has, so that narrow matrices too give
// the multiprocessors work.
int Bf16LinearSegments(int64_t n, int64_t k);

// Enqueues on `stream`. Errors: INVALID_ARGUMENT for a shape or pointer that it cannot take, naming
// it; INTERNAL if the launch fails. Any thread.
absl::Status LaunchBf16Linear(const Bf16LinearParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
