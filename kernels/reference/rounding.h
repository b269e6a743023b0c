#pragma once

// How the reference rounds. One implementation of each formula serves two purposes: compared
// tightly with golden results (kFloat32), and stating what a serving backend must approximate
// (kServing).

#include <cstdint>

#include "base/float_formats.h"

namespace moebius::kernels::reference {

enum class Rounding : uint8_t {
  // Activations, cache and expert rows stay float32; weights are used as stored.
  kFloat32,
  // As kFloat32, but what routed experts of FP8 models read is rounded to e4m3 in 1x128 blocks:
  // the quantising reference that FP8 tolerances are measured with.
  kQuantizedExperts,
  // As served: BF16 activations, residual and latent cache; e4m3 expert rows if the model is FP8.
  kServing,
};

// A value where the serving arithmetic stores an activation in BF16.
inline float RoundActivation(float value, Rounding rounding) {
  return rounding == Rounding::kServing ? ToFloat(ToBf16(value)) : value;
}

}  // namespace moebius::kernels::reference
