#pragma once

#include <cstdint>

namespace moebius::kernels::cuda {

struct SiluDifferences {
  uint64_t compared = 0;
  uint64_t different = 0;
  float example = 0;  // one of the different
};

// SwiGluInPlace (kernels/cuda/expert_ffn/tile_swiglu.cuh) with an up of 1, for every float32 gate
// in groups of eight, against the division and the exponential taken one by one. A NaN is a NaN.
// Every eighth group is compared once more with one of the eight replaced by NaN, so that the other
// seven take the long way.
SiluDifferences CompareSiluOfAllGates();

}  // namespace moebius::kernels::cuda
