#pragma once

// What Combine and CombineNorm check and translate alike. Host code.

#include "absl/status/status.h"
#include "kernels/cuda/combine/combine.h"
#include "kernels/cuda/device/canonical_sum.cuh"

namespace moebius::kernels::cuda {

absl::Status ValidateCombine(const char* op, const CombineParams& params);
ExpertRows ToExpertRows(const CombineParams& params);
// Whether all rows can be read in 16-byte vectors.
bool CombineIsAligned(const CombineParams& params);

}  // namespace moebius::kernels::cuda
