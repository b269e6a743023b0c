#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moebius::model {
namespace {

// The (fractional) pair index whose wavelength makes `rotations` turns within the original context.
double CorrectionDim(double rotations, double dim, double theta, double original_positions) {
  return dim * std::log(original_positions / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(theta));
}

}  // namespace

double YarnMscale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

std::vector<float> RopeInvFreq(const ModelConfig& config) {
  const int64_t dim = config.qk_rope_head_dim;
  const int64_t pairs = dim / 2;
  std::vector<float> inv_freq(pairs);
  std::vector<float> wavelength(pairs);  // theta^(2i/d)
  for (int64_t i = 0; i < pairs; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    wavelength[i] = static_cast<float>(
        std::pow(static_cast<double>(static_cast<float>(config.rope_theta)), exponent));
    inv_freq[i] = 1.0f / wavelength[i];
  }
  if (!config.rope_scaling) return inv_freq;

  const YarnScaling& yarn = *config.rope_scaling;
  const auto correction = [&](double beta) {
    return CorrectionDim(beta, static_cast<double>(dim), config.rope_theta,
                         static_cast<double>(yarn.original_max_position_embeddings));
  };
  const double low = std::max(std::floor(correction(yarn.beta_fast)), 0.0);
  double high = std::min(std::ceil(correction(yarn.beta_slow)), static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  for (int64_t i = 0; i < pairs; ++i) {
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f,
        1.0f);
    const float keep = 1.0f - ramp;
    const float interpolated = 1.0f / (static_cast<float>(yarn.factor) * wavelength[i]);
    inv_freq[i] = interpolated * (1.0f - keep) + inv_freq[i] * keep;
  }
  return inv_freq;
}

double RopeCosSinMultiplier(const ModelConfig& config) {
  if (!config.rope_scaling) return 1.0;
  const YarnScaling& yarn = *config.rope_scaling;
  return YarnMscale(yarn.factor, yarn.mscale) / YarnMscale(yarn.factor, yarn.mscale_all_dim);
}

std::vector<float> RopeCosSinTable(const ModelConfig& config, int64_t positions) {
  const std::vector<float> inv_freq = RopeInvFreq(config);
  const double multiplier = RopeCosSinMultiplier(config);
  std::vector<float> table;
  table.reserve(static_cast<size_t>(positions) * inv_freq.size() * 2);
  for (int64_t position = 0; position < positions; ++position) {
    for (const float frequency : inv_freq) {
      const float angle = static_cast<float>(position) * frequency;
      // Through double, so that the F32 result does not depend on which libm variant runs.
      table.push_back(static_cast<float>(std::cos(static_cast<double>(angle)) * multiplier));
      table.push_back(static_cast<float>(std::sin(static_cast<double>(angle)) * multiplier));
    }
  }
  return table;
}

}  // namespace moebius::model
