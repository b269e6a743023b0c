#pragma once

// Token embedding (kernels/linear.h, EmbedParams): out[i] = table[ids[i]], a copy of BF16 rows.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"
#include "base/ids.h"

namespace moebius::kernels::cuda {

// Device pointers, borrowed until the stream has passed the launch.
struct EmbeddingParams {
  int64_t m = 0;  // rows; 0 does nothing
  int64_t vocab = 0;
  int64_t dim = 0;              // 1 .. 2^20
  const Bf16* table = nullptr;  // [vocab, dim] dense
  // [m]. An id outside of 0 .. vocab - 1 is the caller's mistake; it reads nothing and gives a row
  // of NaN, so that it shows.
  const TokenId* ids = nullptr;
  Bf16* out = nullptr;  // [m, dim] dense
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
