#pragma once

// The seam below the node: moves frames between processes. It knows connections, not peers,
// sessions or heartbeats (those are the node's, above it, and the same for every transport).
//
// Contract, held by tests/runtime/transport_conformance.h on every implementation:
//   - frames of one connection arrive in the order sent, whole, or not at all;
//   - a completed send means the buffer is free again, NOT that the frame was delivered;
//   - after kClosed for a connection nothing more is reported for it, and every send that was in
//   flight
//     on it has been completed (failed) before that event;
//   - nothing is dropped silently while the connection lives: a full queue refuses (kBusy) and a
//     kWritable event follows;
//   - the transport validates nothing but lengths: payloads over the limit close the connection.
//
// Threading: every method on the node's loop thread, except Wake().

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "runtime/clock.h"
#include "runtime/message.h"

namespace moebius::runtime {

using ConnectionId = uint64_t;  // never reused within one transport

struct TransportEvent {
  enum class Kind : uint8_t {
    kAccepted,   // a peer connected to our listener
    kConnected,  // our Connect succeeded
    kClosed,     // broken, refused, or closed by either side; `status` says why
    kFrame,      // `frame` arrived (header bytes copied, not yet validated)
    kWritable,   // after kBusy: try again
  };
  Kind kind = Kind::kClosed;
  ConnectionId connection = 0;
  Frame frame;
  absl::Status status;
};

class Transport {
 public:
  virtual ~Transport() = default;

  // Address that peers connect to, after the listener is up ("127.0.0.1:37041").
  virtual std::string ListenAddress() const = 0;

  // Starts connecting; the outcome is an event (kConnected or kClosed).
  virtual ConnectionId Connect(const std::string& address) = 0;

  // kSent consumes the frame (it must be sealed). kUnreachable for a closed connection.
  virtual SendResult Send(ConnectionId connection, Frame& frame) = 0;

  // Force-closes: what is in flight fails; a kClosed event follows. Idempotent.
  virtual void Close(ConnectionId connection) = 0;

  // Makes progress and appends what happened to `events`. Never blocks.
  virtual void Poll(std::vector<TransportEvent>& events) = 0;

  // Blocks until something may have happened, Wake() is called, or `timeout` passes. Simulated
  // transports return at once.
  virtual void Wait(Duration timeout) = 0;

  // Any thread: makes a current or the next Wait return.
  virtual void Wake() = 0;
};

}  // namespace moebius::runtime
