#pragma once

// Frames that the nodes themselves exchange, below the actors.
//
// kHello (from the side that connected) and kHelloReply: payload HelloRecord. Sides with different
// protocol version, model digest or numerics class refuse each other: an answer computed by such a
// peer would have other bits. kHeartbeat: no payload, so that a node whose buffers are all taken
// still answers; the header's correlation is its number within the session, from 1, and
// kHeartbeatReply echoes it.

#include <cstdint>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/wire/frame.h"

namespace moebius::wire {

enum class NodeRole : uint16_t {
  kUnknown = 0,
  kAttention = 1,
  kRouter = 2,
  kExpert = 3,
  kTest = 4
};

struct HelloRecord {
  uint64_t node = 0;
  uint64_t incarnation = 0;
  uint64_t expected_node = 0;         // whom the sender means to talk to; 0 = whoever answers
  uint64_t expected_incarnation = 0;  // 0 = any
  uint64_t model_digest_low = 0;
  uint64_t model_digest_high = 0;
  uint64_t numerics_class = 0;  // hash of wire dtype and the backend's numerics name
  uint64_t max_payload_bytes = 0;
  uint32_t credits =
      0;              // frames the receiver of this record may have outstanding towards the sender
  uint16_t role = 0;  // NodeRole
  uint16_t reserved = 0;
};
static_assert(sizeof(HelloRecord) == 72);
static_assert(std::is_trivially_copyable_v<HelloRecord>);

// Copies the record out of a payload; INVALID_ARGUMENT names what is wrong with it.
absl::Status ParseHello(absl::Span<const std::byte> payload, HelloRecord* record);

// Of kHeartbeat and kHeartbeatReply. INVALID_ARGUMENT for a payload or a number of 0.
absl::Status ValidateHeartbeat(const FrameHeader& header);

}  // namespace moebius::wire
