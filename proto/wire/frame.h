#pragma once

// The fixed header of every data-plane frame, little-endian, followed by `payload_bytes` of
// payload. See docs/wire-format.md. Trivially copyable: it is copied to and from the wire as bytes.
// Nothing here is a memory address or a handle; nothing received is trusted before ValidateFrame.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace moebius::wire {

inline constexpr uint32_t kFrameMagic = 0x4245'4F4D;  // "MOEB"
inline constexpr uint16_t kProtocolVersion = 1;

enum class FrameType : uint16_t {
  kInvalid = 0,
  // Session, handled by the node itself (proto/wire/session.h).
  kHello = 1,
  kHelloReply = 2,
  kHeartbeat = 3,
  kHeartbeatReply = 4,
  kAcknowledge = 5,  // carries only the header's `acknowledged`, when nothing else would
  // Attention worker <-> router (proto/wire/route.h).
  kRouteRequest = 16,
  kRouteReply = 17,
  kRouteAbandon = 18,
  // Router <-> expert worker (proto/wire/dispatch.h).
  kDispatch = 32,
  kCombine = 33,
  kNotHosted = 34,
  // Free for tests.
  kTest = 240,
};

struct FrameHeader {
  uint32_t magic = kFrameMagic;
  uint16_t version = kProtocolVersion;
  uint16_t type = 0;          // FrameType
  uint64_t checksum = 0;      // XXH3-64 of header (this field zero) and payload
  uint64_t model_digest = 0;  // low 64 bits of the model digest; 0 before the handshake
  uint64_t source_node = 0;   // NodeId
  uint64_t source_incarnation = 0;
  uint64_t destination_incarnation = 0;  // 0 in a Hello; else a mismatch makes the frame void
  uint16_t source_actor = 0;
  uint16_t destination_actor = 0;
  uint16_t lane = 0;
  uint16_t attempt = 0;  // of these rows; 0 = first
  uint64_t epoch = 0;    // placement the sender planned with
  uint64_t step = 0;
  uint32_t layer = 0;
  uint32_t row_count = 0;   // token rows described by the payload
  uint32_t item_count = 0;  // (row, expert) pairs, where the type has them
  uint32_t row_bytes = 0;   // bytes of one encoded row
  uint64_t payload_bytes = 0;
  uint64_t correlation = 0;   // chosen by the requester, echoed by the answer
  uint64_t sequence = 0;      // per session and direction, from 1, without gaps
  uint64_t acknowledged = 0;  // data frames of the other direction taken in so far (credits)
  uint8_t reserved[8] = {};   // zero
};

static_assert(std::is_trivially_copyable_v<FrameHeader>);
static_assert(sizeof(FrameHeader) == 128);
static_assert(offsetof(FrameHeader, checksum) == 8);
static_assert(offsetof(FrameHeader, model_digest) == 16);
static_assert(offsetof(FrameHeader, source_node) == 24);
static_assert(offsetof(FrameHeader, source_incarnation) == 32);
static_assert(offsetof(FrameHeader, destination_incarnation) == 40);
static_assert(offsetof(FrameHeader, source_actor) == 48);
static_assert(offsetof(FrameHeader, epoch) == 56);
static_assert(offsetof(FrameHeader, step) == 64);
static_assert(offsetof(FrameHeader, layer) == 72);
static_assert(offsetof(FrameHeader, row_count) == 76);
static_assert(offsetof(FrameHeader, item_count) == 80);
static_assert(offsetof(FrameHeader, row_bytes) == 84);
static_assert(offsetof(FrameHeader, payload_bytes) == 88);
static_assert(offsetof(FrameHeader, correlation) == 96);
static_assert(offsetof(FrameHeader, sequence) == 104);
static_assert(offsetof(FrameHeader, acknowledged) == 112);
static_assert(offsetof(FrameHeader, reserved) == 120);

// Checksum of `header` (its checksum field taken as zero) and `payload`.
uint64_t FrameChecksum(const FrameHeader& header, absl::Span<const std::byte> payload);

// Fills payload_bytes and checksum; the last step before a frame leaves.
void SealFrame(FrameHeader& header, absl::Span<const std::byte> payload);

// Parses a header from bytes off the wire: INVALID_ARGUMENT names the field (length, magic,
// reserved, payload_bytes against `payload` and `payload_limit`), FAILED_PRECONDITION another
// protocol version, DATA_LOSS a bad checksum.
absl::Status ValidateFrame(absl::Span<const std::byte> header_bytes,
                           absl::Span<const std::byte> payload, uint64_t payload_limit,
                           FrameHeader* header);

}  // namespace moebius::wire
