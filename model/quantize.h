#pragma once

// Weight quantisation between BF16 / F32 and F8_E4M3 with one F32 scale per 128x128 block
// (DeepSeek-V3 report section 3.3.2), as used by `moebius convert`. Scalar and exact: serving
// kernels read the blocks themselves. Pure functions.
//
//   quantise:   s = amax / 448 over the block (1 if the block is all zero), code = e4m3(w / s)
//   dequantise: w = value(code) * s, in F32, rounded once to BF16
//
// Ragged blocks at the right and lower edge are just smaller.

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "base/float_formats.h"
#include "model/safetensors.h"

namespace moebius::model {

struct QuantizedMatrix {
  std::vector<E4m3> codes;    // [rows, cols]
  std::vector<float> scales;  // [ceil(rows / 128), ceil(cols / 128)]
};

// `bytes` holds [rows, cols] of BF16 or F32, at any alignment. INVALID_ARGUMENT if an element is
// not finite.
absl::Status QuantizeMatrix(DType dtype, absl::Span<const std::byte> bytes, int64_t rows,
                            int64_t cols, QuantizedMatrix& out);

// `codes` holds [rows, cols] e4m3, `scales` F32 of the blocks, at any alignment.
std::vector<Bf16> DequantizeMatrix(absl::Span<const std::byte> codes,
                                   absl::Span<const std::byte> scales, int64_t rows, int64_t cols);

}  // namespace moebius::model
