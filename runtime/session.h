#pragma once

// Sessions between this node and its peers, above the transport's connections: handshake,
// incarnations, sequence numbers, credits, heartbeats and the health of the link. Used by Node
// only, on its loop thread.
//
// A session belongs to one connection and to the side that opened it. A node that called
// Connect(peer) sends on its own session; a node that did not sends on the one the peer opened (an
// expert worker never dials out). Two nodes that both connect have two independent sessions.
//
// Credits: a session may have `credits` data frames outstanding in each direction; the receiver
// returns them with the cumulative count `acknowledged` in the header of every frame it sends back,
// and with an explicit kAcknowledge once half of them are unreturned. A frame is acknowledged when
// its actor has received it, so the sum of all sessions' credits bounds the mailbox; a peer that
// sends more than it was granted is cut off. Credits die with their session.
//
// Link states, from heartbeats with answers (a completed send proves nothing): no answer for
// `slow_after` -> kSlow, `suspect_after` -> kSuspect, `dead_after` or a closed connection -> kDown.
// An accepted session that hears nothing for `dead_after` is closed. Time in which this node itself
// did not run (its process was stopped, its core taken) is not counted as silence of others.

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "base/hash.h"
#include "base/ids.h"
#include "base/prng.h"
#include "proto/wire/session.h"
#include "runtime/buffer_pool.h"
#include "runtime/context.h"
#include "runtime/transport.h"

namespace moebius::runtime {

struct LinkTimings {
  Duration heartbeat_every = std::chrono::milliseconds(100);
  Duration slow_after = std::chrono::milliseconds(250);
  Duration suspect_after = std::chrono::seconds(1);
  Duration dead_after = std::chrono::seconds(2);
  Duration reconnect_min = std::chrono::milliseconds(50);
  Duration reconnect_max = std::chrono::seconds(2);
};

// What both sides of a session must agree on, and who we are.
struct SessionIdentity {
  NodeId node;
  Incarnation incarnation;
  wire::NodeRole role = wire::NodeRole::kUnknown;
  Hash128Value model_digest;
  uint64_t numerics_class = 0;
};

// Counters of one node's data plane; copied out by Node::counters().
struct SessionCounters {
  uint64_t frames_sent = 0;
  uint64_t frames_received = 0;
  uint64_t bytes_sent = 0;
  uint64_t bytes_received = 0;
  uint64_t checksum_failures = 0;   // damaged or malformed frames; each closes its connection
  uint64_t fenced_frames = 0;       // of an old incarnation or to one: void
  uint64_t refused_handshakes = 0;  // other version, model, numerics class, node or incarnation
  uint64_t sessions_opened = 0;
  uint64_t sessions_closed = 0;
};

// A data frame of a live session; its credit goes back with SessionTable::Acknowledge.
struct InboundFrame {
  uint64_t session = 0;
  FrameReceived message;
};

// What the table reports to the node, in the order in which it happened.
using SessionEvent = std::variant<InboundFrame, LinkChanged, Writable>;
using SessionEvents = std::vector<SessionEvent>;

class SessionTable {
 public:
  SessionTable(SessionIdentity identity, LinkTimings timings, uint32_t credits,
               uint64_t max_payload_bytes, Transport& transport, BufferPool& pool, uint64_t seed);

  void Connect(const PeerInfo& peer, TimePoint now);
  void Disconnect(NodeId node);

  // Sends a data frame; fills the header's node, incarnation, sequence and checksum fields.
  SendResult Send(NodeId to, Frame& frame);

  // Reacts to one transport event; appends to `events`.
  void OnTransportEvent(TransportEvent& event, TimePoint now, SessionEvents& events);

  // Heartbeats, timeouts, reconnects. Call at least every `heartbeat_every`.
  void Tick(TimePoint now, SessionEvents& events);

  // The frame of `session` was received by its actor: its credit goes back.
  void Acknowledge(uint64_t session);

  // Ends a session whose frame the node cannot take in.
  void Refuse(uint64_t session, const std::string& reason, TimePoint now, SessionEvents& events);

  // The link to a peer that Connect named, if it is not down: what a later watcher must be told.
  std::optional<LinkChanged> LinkTo(NodeId node) const;

  TimePoint NextTick() const { return next_tick_; }
  const SessionCounters& counters() const { return counters_; }
  // Data frames sent and not acknowledged over all live sessions: 0 when everything balances.
  uint64_t outstanding_frames() const;
  // Upper bound of unacknowledged data frames towards this node, for sizing its mailbox.
  static constexpr uint32_t kMaxSessions = 256;

 private:
  struct Session {
    uint64_t id = 0;  // 0 = free slot
    ConnectionId connection = 0;
    bool initiator = false;
    bool up = false;
    NodeId peer;
    Incarnation peer_incarnation;
    uint64_t next_sequence = 1;      // of frames we send
    uint64_t received_sequence = 0;  // of the last frame taken in
    uint64_t sent_data = 0;
    uint64_t acknowledged_by_peer = 0;
    uint64_t arrived_data = 0;   // data frames taken off the transport
    uint64_t received_data = 0;  // data frames whose actor has received them
    uint64_t acknowledged_by_us = 0;
    uint32_t send_credits = 0;
    uint64_t peer_max_payload = 0;
    bool busy_reported = false;  // a Send was refused: announce when it can be tried again
    bool refused = false;        // our answer told the peer why; nothing more is taken from it
    uint64_t heartbeat_number = 0;
    TimePoint oldest_unanswered;  // of our heartbeats; valid if heartbeat_pending
    bool heartbeat_pending = false;
    uint64_t pending_number = 0;
    TimePoint last_heard;
    TimePoint next_heartbeat;
    LinkState state = LinkState::kUp;
  };
  struct Peer {  // somebody we connect to
    PeerInfo info;
    uint64_t session = 0;
    Duration backoff{};
    TimePoint retry_at;
    bool waiting_to_retry = false;
  };

  Session* FindSession(uint64_t id);
  Session* FindByConnection(ConnectionId connection);
  Session* SendingSession(NodeId to);
  Peer* FindPeer(NodeId node);
  Session* NewSession(ConnectionId connection, bool initiator, TimePoint now);
  void Dial(Peer& peer, TimePoint now);
  void SendHello(Session& session, wire::FrameType type, const PeerInfo* expected);
  bool SendControl(Session& session, wire::FrameType type, Frame frame = {});
  SendResult SendSealed(Session& session, Frame& frame);
  // Closes the session's connection and forgets it; tells the watchers if it was an announced peer.
  void Drop(Session& session, const std::string& reason, TimePoint now, SessionEvents& events);
  void OnFrame(Session& session, Frame frame, TimePoint now, SessionEvents& events);
  void OnHello(Session& session, const Frame& frame, TimePoint now, SessionEvents& events);
  absl::Status CheckHello(const Session& session, const wire::HelloRecord& record) const;
  void ApplyAcknowledged(Session& session, uint64_t acknowledged, SessionEvents& events);
  void UpdateLinkState(Session& session, TimePoint now, SessionEvents& events);
  void ForgiveOwnStall(TimePoint now);
  TimePoint NextThreshold(const Session& session, TimePoint now) const;

  const SessionIdentity identity_;
  const LinkTimings timings_;
  const uint32_t credits_;
  const uint64_t max_payload_bytes_;
  Transport& transport_;
  BufferPool& pool_;
  Prng prng_;
  std::vector<Session> sessions_;  // fixed number of slots
  std::vector<Peer> peers_;
  uint64_t next_session_id_ = 1;
  TimePoint next_tick_;
  TimePoint last_tick_;
  SessionCounters counters_;
};

}  // namespace moebius::runtime
