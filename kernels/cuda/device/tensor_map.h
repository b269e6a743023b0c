#pragma once

// Tensor maps: how the copy engine (TMA) finds boxes of a matrix in device memory.

#include <cuda.h>

#include <cstdint>

#include "absl/status/statusor.h"

namespace moebius::kernels::cuda {

// A row-major matrix of `element_bytes` (1: bytes, 2: BF16, 4: float32) wide elements: `rows` x
// `cols`, row stride in bytes a multiple of 16, base 16-aligned. Boxes are box_rows x box_cols;
// with `swizzle_128b` a box row must be at most 128 bytes and lies in shared memory as
// kernels/cuda/device/wgmma.cuh describes. Elements outside of the matrix read as zero.
struct MatrixMap {
  const void* base = nullptr;
  int element_bytes = 1;
  uint64_t rows = 0;
  uint64_t cols = 0;
  uint64_t row_stride_bytes = 0;
  uint32_t box_rows = 0;
  uint32_t box_cols = 0;
  bool swizzle_128b = true;
  // Whether a miss also fetches the other half of its 256 bytes into L2.
  bool l2_promotion = true;
};

// Encodes the map on the host; InvalidArgument if the driver refuses the shape, Unavailable without
// a driver. Any thread. Pass the result to a kernel by value as `const __grid_constant__
// CUtensorMap`.
absl::StatusOr<CUtensorMap> EncodeMatrixMap(const MatrixMap& matrix);

}  // namespace moebius::kernels::cuda
