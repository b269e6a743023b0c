#include "proto/wire/frame.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/hash.h"

namespace moebius::wire {

uint64_t FrameChecksum(const FrameHeader& header, absl::Span<const std::byte> payload) {
  FrameHeader copy = header;
  copy.checksum = 0;
  return Hash64(payload.data(), payload.size(), Hash64(&copy, sizeof(copy)));
}

void SealFrame(FrameHeader& header, absl::Span<const std::byte> payload) {
  header.payload_bytes = payload.size();
  header.checksum = FrameChecksum(header, payload);
}

absl::Status ValidateFrame(absl::Span<const std::byte> header_bytes,
                           absl::Span<const std::byte> payload, uint64_t payload_limit,
                           FrameHeader* header) {
  if (header_bytes.size() != sizeof(FrameHeader)) {
    return absl::InvalidArgumentError(absl::StrCat("frame header: ", header_bytes.size(),
                                                   " bytes, expected ", sizeof(FrameHeader)));
  }
  std::memcpy(header, header_bytes.data(), sizeof(FrameHeader));
  if (header->magic != kFrameMagic) {
    return absl::InvalidArgumentError("frame header: magic is not MOEB");
  }
  if (header->version != kProtocolVersion) {
    return absl::FailedPreconditionError(absl::StrCat("frame header: version ", header->version,
                                                      ", this node speaks ", kProtocolVersion));
  }
  for (uint8_t byte : header->reserved) {
    if (byte != 0) return absl::InvalidArgumentError("frame header: reserved bytes are not zero");
  }
  if (header->payload_bytes != payload.size() || header->payload_bytes > payload_limit) {
    return absl::InvalidArgumentError(absl::StrCat("frame header: payload_bytes ",
                                                   header->payload_bytes, ", received ",
                                                   payload.size(), ", limit ", payload_limit));
  }
  if (header->checksum != FrameChecksum(*header, payload)) {
    return absl::DataLossError("frame: checksum mismatch");
  }
  return absl::OkStatus();
}

}  // namespace moebius::wire
