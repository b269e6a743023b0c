#pragma once

// The digest of a token event (kernels/sampling.h, RowDigestParams): XXH3-64 over the bytes of the
// final hidden row, seeded with the bits of the token's float32 log-probability. Equal to
// kernels/reference and kernels/cpu for every row, so a digest does not depend on who computed it.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

inline constexpr int64_t kRowDigestMaxDim = 32768;

// Device pointers, borrowed until the stream has passed the launch.
struct RowDigestParams {
  int64_t m = 0;                 // rows; 0 does nothing
  int64_t dim = 0;               // 1 .. kRowDigestMaxDim
  const Bf16* hidden = nullptr;  // [m, dim], row stride hidden_stride elements
  int64_t hidden_stride = 0;
  const float* logprobs = nullptr;  // [m]
  uint64_t* digests = nullptr;      // [m] out
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchRowDigest(const RowDigestParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
