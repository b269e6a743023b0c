#pragma once

// Views of weights that somebody else owns (usually a memory-mapped checkpoint). Plain records,
// copied freely; the owner must outlive them. They live in base/ because model/ makes them and
// kernels/ reads them, and those two floors are blind to each other.

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace moebius {

// Quantisation block of F8_E4M3 weights and activations (DeepSeek-V3 report, section 3.3.2).
inline constexpr int64_t kQuantBlock = 128;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A linear layer's weight, [rows = out_features, cols = in_features] row-major and dense; the layer
// computes y = x * W^T. W[i][j] = value(data[i][j]) * scale_inv[i / 128][j / 128] for kE4m3 (the
// scale is a multiplier despite the checkpoint's name for it).
struct MatrixView {
  DType dtype = DType::kBf16;
  int64_t rows = 0;
  int64_t cols = 0;
  const std::byte* data = nullptr;   // aligned to SizeOf(dtype)
  const float* scale_inv = nullptr;  // [ceil(rows/128), ceil(cols/128)]; nullptr unless kE4m3
  bool empty() const { return data == nullptr; }
  int64_t bytes() const { return rows * cols * SizeOf(dtype); }
};

}  // namespace moebius
