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

absl::Status ParseHeartbeat(absl::Span<const std::byte> payload, HeartbeatRecord* record) {
  if (payload.size() != sizeof(HeartbeatRecord)) {
    return absl::InvalidArgumentError(
        absl::StrCat("heartbeat: ", payload.size(), " bytes, expected ", sizeof(HeartbeatRecord)));
  }
  std::memcpy(record, payload.data(), sizeof(HeartbeatRecord));
  if (record->number == 0) return absl::InvalidArgumentError("heartbeat: number is 0");
  return absl::OkStatus();
}

}  // namespace moebius::wire
