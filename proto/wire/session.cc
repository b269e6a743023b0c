#include "proto/wire/session.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace moebius::wire {

absl::Status ParseHello(absl::Span<const std::byte> payload, HelloRecord* record) {
  if (payload.size() != sizeof(HelloRecord)) {
    return absl::InvalidArgumentError(
        absl::StrCat("hello: ", payload.size(), " bytes, expected ", sizeof(HelloRecord)));
  }
  std::memcpy(record, payload.data(), sizeof(HelloRecord));
  if (record->node == 0) return absl::InvalidArgumentError("hello: node is 0");
  if (record->incarnation == 0) return absl::InvalidArgumentError("hello: incarnation is 0");
  if (record->credits == 0) return absl::InvalidArgumentError("hello: credits is 0");
  if (record->reserved != 0) return absl::InvalidArgumentError("hello: reserved is not 0");
  return absl::OkStatus();
}

absl::Status ValidateHeartbeat(const FrameHeader& header) {
  if (header.payload_bytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("heartbeat: payload_bytes is ", header.payload_bytes, ", expected 0"));
  }
  if (header.correlation == 0) return absl::InvalidArgumentError("heartbeat: correlation is 0");
  return absl::OkStatus();
}

}  // namespace moebius::wire
