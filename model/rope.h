#pragma once

// Rotary position embedding with YaRN, as tables that the kernels read. Formulas: Su et al. 2021;
// Peng et al. 2023 (YaRN) section 3; DeepSeek-V3 report section 4.3. Pure functions.

#include <cstdint>
#include <vector>

#include "model/config.h"

namespace moebius::model {

// YaRN's temperature m(s, a) = 0.1 * a * ln(s) + 1, and 1 for s <= 1.
double YarnMscale(double factor, double mscale);

// Inverse frequency of each rotated pair, [qk_rope_head_dim / 2] F32, computed in F32 steps in the
// order of the reference implementation. They apply at every length, not only beyond the original
// context.
std::vector<float> RopeInvFreq(const ModelConfig& config);

// Factor on both cos and sin: m(s, mscale) / m(s, mscale_all_dim); 1 without YaRN.
double RopeCosSinMultiplier(const ModelConfig& config);

// cos and sin of position * inv_freq, times the multiplier: [positions, qk_rope_head_dim / 2, 2]
// F32, cos first. The angle is the F32 product of the F32 position and frequency (references do the
// same; a double product differs visibly beyond about 10^4).
std::vector<float> RopeCosSinTable(const ModelConfig& config, int64_t positions);

}  // namespace moebius::model
