#pragma once

// Everything an actor may do. Valid only during Receive, on the node's loop thread. The simulated
// and the real node implement it alike, so an actor cannot tell which one it runs on.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "runtime/message.h"

namespace moebius::runtime {

// Where a peer's data plane listens, as the control plane tells it.
struct PeerInfo {
  NodeId node;
  Incarnation incarnation;   // 0 = whatever answers
  std::string data_address;  // "127.0.0.1:7001"; a node name in simulation
};

class Context {
 public:
  virtual ~Context() = default;

  virtual ActorAddress Self() const = 0;
  virtual Incarnation SelfIncarnation() const = 0;
  virtual TimePoint Now() const = 0;
  virtual uint64_t Random() = 0;  // seeded; never for anything that reaches a token

  // Sends to an actor of this node or another. On kSent the frame is consumed; otherwise it is left
  // as it was. Frames between one pair of nodes arrive in order within a session, or not at all.
  virtual SendResult Send(const ActorAddress& to, Frame& frame) = 0;

  // A payload buffer from the node's pool; nullopt = back-pressure (a Writable with this node's own
  // id follows when one is free).
  virtual std::optional<Buffer> AcquireBuffer(size_t bytes) = 0;

  // Fires once after `delay`; returns its number. Cancelling one that fired already does nothing.
  virtual uint64_t SetTimer(Duration delay, uint64_t tag) = 0;
  virtual void CancelTimer(uint64_t timer) = 0;

  // Runs `work` beside the loop (a compute thread; inline at a later virtual time in simulation)
  // and answers with ComputeDone{tag}. Works of one actor run one after another in order of
  // submission. What `work` captures must live until then.
  virtual void Submit(std::function<absl::Status()> work, uint64_t tag) = 0;

  // Opens (or keeps) a session to a peer and watches it: LinkChanged tells the actor. Idempotent; a
  // newer incarnation replaces the older. Reconnects with back-off until Disconnect.
  virtual void Connect(const PeerInfo& peer) = 0;
  virtual void Disconnect(NodeId node) = 0;
};

}  // namespace moebius::runtime
