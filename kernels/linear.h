#pragma once

// Parameters of the dense operations: embedding, RMSNorm, linear layers, SwiGLU, residual
// additions. All pointers are borrowed for the call. Rows are dense unless a stride says otherwise
// (strides in elements). `m` is the number of token rows; 0 is allowed and does nothing.
//
// Serving arithmetic (every backend; the row rule of docs/exactness.md binds each output element):
//   inputs as stored, products and sums in float32 in an order that depends on (N, K) alone,
//   one rounding to the output type.

#include <cstdint>

#include "base/float_formats.h"
#include "base/ids.h"
#include "base/tensor_view.h"

namespace moebius::kernels {

// out[i] = table[ids[i]] (no scaling). The table is BF16 [vocab, dim]; ids are within it (checked).
struct EmbedParams {
  int64_t m = 0;
  MatrixView table;
  const TokenId* ids = nullptr;  // [m]
  Bf16* out = nullptr;           // [m, table.cols]
};

// out = bf16(x * rsqrt(mean(x^2) + eps) * weight), statistics in float32 over `dim`, one rounding.
struct RmsNormParams {
  int64_t m = 0;
  int64_t dim = 0;
  const Bf16* x = nullptr;  // [m, dim], row stride x_stride
  int64_t x_stride = 0;
  const float* weight = nullptr;  // [dim]
  float eps = 1e-6f;
  Bf16* out = nullptr;  // [m, dim], row stride out_stride; may alias x
  int64_t out_stride = 0;
};

// out = x * W^T, x in BF16. Exactly one of out_bf16 / out_f32 is set (float32 for the gate and the
// LM head). FP8 weights: each 128-block of K is summed, then multiplied by its scale.
struct LinearParams {
  int64_t m = 0;
  MatrixView weight;        // [n, k]; kF32 for gates stored so
  const Bf16* x = nullptr;  // [m, k], row stride x_stride
  int64_t x_stride = 0;
  Bf16* out_bf16 = nullptr;  // [m, n], row stride out_stride
  float* out_f32 = nullptr;
  int64_t out_stride = 0;
};

// out = bf16(silu(gate) * up), silu(z) = z / (1 + exp(-z)), in float32 with one rounding.
struct SwiGluParams {
  int64_t m = 0;
  int64_t dim = 0;
  const Bf16* gate = nullptr;  // [m, dim] dense
  const Bf16* up = nullptr;    // [m, dim] dense
  Bf16* out = nullptr;         // [m, dim] dense; may alias gate or up
};

// h = bf16(h + y).
struct ResidualAddParams {
  int64_t m = 0;
  int64_t dim = 0;
  Bf16* h = nullptr;        // [m, dim] dense
  const Bf16* y = nullptr;  // [m, dim] dense
};

// The end of an MoE layer: y = bf16(routed + shared), h = bf16(h + y): two roundings, in this
// order.
struct MoeResidualParams {
  int64_t m = 0;
  int64_t dim = 0;
  Bf16* h = nullptr;             // [m, dim]
  const Bf16* routed = nullptr;  // [m, dim]
  const Bf16* shared = nullptr;  // [m, dim]
};

}  // namespace moebius::kernels
