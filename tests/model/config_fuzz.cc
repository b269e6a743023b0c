// Feeds arbitrary text to the config parsers. What is accepted must have finite derived numbers.

#include <cmath>
#include <cstdint>

#include "base/check.h"
#include "model/config.h"
#include "model/manifest.h"
#include "model/rope.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  absl::StatusOr<moebius::model::ModelConfig> config = moebius::model::ParseConfig(text);
  if (!config.ok()) return 0;
  CHECK(std::isfinite(config->softmax_scale()));
  CHECK(config->softmax_scale() > 0);
  for (const float frequency : moebius::model::RopeInvFreq(*config)) {
    CHECK(std::isfinite(frequency));
  }
  for (const float value : moebius::model::RopeCosSinTable(*config, 3)) {
    CHECK(std::isfinite(value));
  }
  for (int64_t layer = 0; layer < config->total_layers(); ++layer) config->is_moe_layer(layer);
  moebius::model::HashOfConfig(*config);
  moebius::model::MergeGenerationConfig(text, *config).IgnoreError();
  return 0;
}
