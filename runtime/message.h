#pragma once

// What an actor can receive. Plain records; the node makes them, one at a time, on its loop thread.

#include <any>
#include <cstdint>
#include <string>
#include <variant>

#include "absl/status/status.h"
#include "base/ids.h"
#include "proto/wire/frame.h"
#include "runtime/buffer_pool.h"
#include "runtime/clock.h"

namespace moebius::runtime {

// An actor anywhere. Logical names only: a node id and a small number within the node.
struct ActorAddress {
  NodeId node;
  ActorId actor;
  friend constexpr auto operator<=>(const ActorAddress&, const ActorAddress&) = default;
};

// Well-known actor numbers. A node may host several expert workers (single-process mode): they take
// kExpertWorker, kExpertWorker + 1, ...
inline constexpr ActorId kAttentionWorker{1};
inline constexpr ActorId kRouter{2};
inline constexpr ActorId kFirstTestActor{64};
inline constexpr ActorId kExpertWorker{256};

// A frame with its payload, between actors of one node or of two. A sender sets type and the role
// fields of the header; the node fills source, incarnations, sequence and checksum.
struct Frame {
  wire::FrameHeader header;
  Buffer payload;
};

struct FrameReceived {
  ActorAddress from;
  Incarnation from_incarnation;
  Frame frame;
};

// A timer of this actor expired; `tag` is what it was set with.
struct TimerFired {
  uint64_t timer = 0;
  uint64_t tag = 0;
};

// Work given to Context::Submit has finished (its effects on memory are visible).
struct ComputeDone {
  uint64_t tag = 0;
  absl::Status status;
};

// Health of the link to a watched peer, from our own heartbeats (docs/failure.md). Transitions:
// kUp <-> kSlow, any -> kDown. kDown is final for that incarnation: its frames in flight are lost
// and late ones are void. A peer that comes back is kUp under a new incarnation or a new session.
enum class LinkState : uint8_t { kUp, kSlow, kSuspect, kDown };
struct LinkChanged {
  NodeId node;
  Incarnation incarnation;
  LinkState state = LinkState::kDown;
  std::string reason;
};

// A Send to `node` that returned kBusy can be tried again.
struct Writable {
  NodeId node;
};

// Posted from outside the loop (gRPC threads, composition root). `body` holds a struct of the
// receiving role's public header; `std::any_cast<T>(&body)` finds it.
struct Posted {
  std::any body;
};

enum class SendResult : uint8_t {
  kSent,         // accepted; delivery is not promised: the answer is the only acknowledgement
  kBusy,         // the session's credits or buffers are used up: keep the frame, wait for Writable
  kUnreachable,  // no live session to that node, or no such local actor: the frame is left
                 // untouched
};

using Message = std::variant<FrameReceived, TimerFired, ComputeDone, LinkChanged, Writable, Posted>;

}  // namespace moebius::runtime
