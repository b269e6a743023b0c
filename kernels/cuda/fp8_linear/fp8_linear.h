#pragma once

// Linear layer with block-scaled FP8 on both sides: out = x W^T (DeepSeek-V3 report section 3.3.2;
// W as it lies in the checkpoint, x quantised 1x128).
//
// An output element is a function of its own row, in an order that depends on (n, k) alone. K is
// cut at fixed places into at most Fp8LinearSegments(n, k) segments of equal numbers of 128-blocks
// (the last may be shorter). In a segment, from zero and ascending: part = 4 wgmma of k32, acc =
// fma(scale_x * scale_w, part, acc) in float32. The segments are added in ascending order and
// rounded once. How many rows share a tile, which side is operand A and who walks the segments
// follow m; none of it reaches the bits (docs/adr/0011, 0014).

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

// Device pointers, borrowed until the stream has passed the launch.
struct Fp8LinearParams {
  int64_t m = 0;  // rows; 0 does nothing
  int64_t n = 0;
  int64_t k = 0;                    // a multiple of 16; a last block of less than 128 is allowed
  const E4m3* x = nullptr;          // [m, k] dense, 16-aligned
  const float* x_scales = nullptr;  // [m, ceil(k / 128)]
  const E4m3* weight = nullptr;     // [n, k] dense, 16-aligned
  const float* weight_scales = nullptr;  // [ceil(n / 128), ceil(k / 128)]
  Bf16* out = nullptr;                   // [m, n], row stride out_stride elements
  int64_t out_stride = 0;
  // No kernel in front of this one on the stream writes `weight` or `weight_scales`, as none does
  // where weights stay on the device: they may be fetched while that kernel still runs (tiles of
  // up to 32 tokens do; the others only bring them to L2 early). All else waits for it.
  bool weights_resident = false;
};

// 1 .. 8: how many segments K has, so that narrow matrices too give every multiprocessor a part.
int Fp8LinearSegments(int64_t n, int64_t k);

// Enqueues on `stream`. Errors: INVALID_ARGUMENT for a shape or pointer that it cannot take, naming
// it; INTERNAL if the launch fails. Any thread.
absl::Status LaunchFp8Linear(const Fp8LinearParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
