// Feeds arbitrary bytes to the frame parser: it must refuse or accept, never crash or read outside.

#include <cstdint>

#include "base/check.h"
#include "proto/wire/frame.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using moebius::wire::FrameHeader;
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  const size_t header_bytes = size < sizeof(FrameHeader) ? size : sizeof(FrameHeader);
  FrameHeader header;
  const absl::Status status = moebius::wire::ValidateFrame(
      {bytes, header_bytes}, {bytes + header_bytes, size - header_bytes}, 1 << 20, &header);
  if (status.ok()) CHECK_EQ(header.payload_bytes, size - header_bytes);
  return 0;
}
