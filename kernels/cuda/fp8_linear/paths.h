#pragma once

// The two kernels behind LaunchFp8Linear. They give the same bits (fp8_linear_test), so the number
// of rows may choose between them and their tiles. Arguments are validated by the caller.

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/cuda/fp8_linear/fp8_linear.h"

namespace moebius::kernels::cuda {

inline constexpr int kFp8Block = 128;  // of K: one scale on either side

// Few rows: weights are operand A; the CTAs of a cluster take a segment of K each. Any shape that
// LaunchFp8Linear takes, `segments` from 1 to 8.
absl::Status LaunchFp8LinearSmall(const Fp8LinearParams& params, int segments, cudaStream_t stream);

// Many rows: tokens are operand A; one CTA walks all segments of an output tile. REQUIRES:
// Fp8LinearLargeTakes.
absl::Status LaunchFp8LinearLarge(const Fp8LinearParams& params, int segments, cudaStream_t stream);
// Whether the copy engine can write the output: its rows are 16-aligned.
bool Fp8LinearLargeTakes(const Fp8LinearParams& params);

}  // namespace moebius::kernels::cuda
