// Feeds arbitrary text to the checkpoint index parser: accepted shard names stay in the directory.

#include <cstdint>

#include "base/check.h"
#include "model/checkpoint.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto index = moebius::model::ParseCheckpointIndex(text);
  if (!index.ok()) return 0;
  for (const auto& [tensor, shard] : index->weight_map) {
    CHECK(shard.find('/') == std::string::npos);
    CHECK(shard.find('\0') == std::string::npos);
    CHECK(shard[0] != '.');
  }
  return 0;
}
