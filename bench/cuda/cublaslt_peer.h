#pragma once

// cuBLASLt beside our own kernels, measured in the same run, where its library is found at run time
// (libcublasLt.so.13; nothing links to it).

#include <cstdint>
#include <string>

#include "base/float_formats.h"
#include "bench/cuda/measure.h"

namespace moebius::bench {

struct CublasLtLinear {
  int64_t m = 0, n = 0, k = 0;           // m is rounded up to a multiple of 4, which it requires
  const E4m3* x = nullptr;               // [m, k]
  const float* x_scales = nullptr;       // [k / 128, m], its own layout
  const E4m3* weight = nullptr;          // [n, k]; TimeCublasLt: the first of `copies`
  const float* weight_scales = nullptr;  // [n / 128, ceil(k / 128 / 4) * 4]
  Bf16* out = nullptr;                   // [m, n]
};

// Microseconds of out = x W^T with scales of 1x128 and 128x128, by its own heuristic's first
// choice, `weights(i)` rotating as in TimeGraph. Negative, and `why` says so, where it cannot be
// measured.
double TimeCublasLtFp8(const CublasLtLinear& linear, int launches,
                       const std::function<const E4m3*(int)>& weights, std::string* why);

}  // namespace moebius::bench
