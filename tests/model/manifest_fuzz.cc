// Feeds arbitrary text to the manifest parser. What is accepted must survive being written again.

#include <cstdint>

#include "base/check.h"
#include "model/manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moebius::model;  // NOLINT: a fuzz target's only function
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto manifest = ParseManifest(text);
  if (!manifest.ok()) return 0;
  const auto again = ParseManifest(WriteManifest(*manifest));
  CHECK(again.ok());
  CHECK(again->digest == manifest->digest);
  CHECK(again->tensors == manifest->tensors);
  return 0;
}
