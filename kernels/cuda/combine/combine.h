#pragma once

// The canonical sum of a token's expert rows (kernels/moe.h, CombineParams), bit-equal to
// kernels/reference for any deployment: per gate group in ascending order P_g = bf16(fma chain over
// its chosen experts, ascending), routed = bf16(float32 sum of P_g, ascending). With `shared` the
// layer's end follows (kernels/linear.h, MoeResidualParams): h = bf16(h + bf16(routed + shared)).

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"
#include "base/ids.h"

namespace moebius::kernels::cuda {

inline constexpr int32_t kCombineMaxTopK = 64;

// Device pointers, borrowed until the stream has passed the launch.
struct CombineParams {
  int64_t m = 0;      // tokens; 0 does nothing
  int64_t dim = 0;    // 1 .. 2^20
  int32_t top_k = 0;  // 1 .. kCombineMaxTopK
  int32_t experts_per_group = 32;
  const ExpertId* experts = nullptr;  // [m, top_k], ascending within a token
  const float* weights = nullptr;     // [m, top_k]

  // Where the rows lie, one way or the other: row_index into one buffer, or a table of pointers
  // (rows of any number of buffers, each 16-aligned if `dim` is a multiple of 8).
  const Bf16* buffer = nullptr;        // [rows, dim] dense
  const int32_t* row_index = nullptr;  // [m, top_k]
  const Bf16* const* rows = nullptr;   // [m, top_k] pointers to `dim` values

  Bf16* out = nullptr;           // [m, dim] routed; nullptr only with `shared`
  const Bf16* shared = nullptr;  // [m, dim], the shared expert's rows; nullptr = no residual
  Bf16* h = nullptr;             // [m, dim], read and written with `shared`
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchCombine(const CombineParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
