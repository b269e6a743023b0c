// Feeds arbitrary files to the safetensors parser. What is accepted must tile the file exactly.

#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moebius::model;  // NOLINT: a fuzz target's only function
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  const absl::StatusOr<uint64_t> length =
      ParseSafetensorsLength({bytes, std::min<size_t>(size, 8)}, size);
  // Also with a length word that always fits, so that mutations reach the header's rules.
  for (const uint64_t header_bytes : {length.ok() ? *length : size, uint64_t{size}}) {
    const size_t begin = length.ok() && header_bytes == *length ? 8 : 0;
    if (header_bytes > size - begin) continue;
    const absl::string_view json(reinterpret_cast<const char*>(data) + begin, header_bytes);
    for (const uint64_t data_bytes : {uint64_t{size - begin - header_bytes}, uint64_t{64}}) {
      const auto header = ParseSafetensorsHeader(json, 8 + header_bytes + data_bytes);
      if (!header.ok()) continue;
      uint64_t expected = 8 + header_bytes;
      for (const TensorInfo& tensor : header->tensors) {
        CHECK_EQ(tensor.offset, expected);
        expected += tensor.bytes;
        CHECK(!Describe(tensor).empty());
      }
      CHECK_EQ(expected, 8 + header_bytes + data_bytes);
    }
  }
  return 0;
}
