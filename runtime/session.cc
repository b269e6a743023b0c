#include "runtime/session.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/log.h"

namespace moebius::runtime {
namespace {

bool IsControl(uint16_t type) {
  return type <= static_cast<uint16_t>(wire::FrameType::kAcknowledge);
}

}  // namespace

SessionTable::SessionTable(SessionIdentity identity, LinkTimings timings, uint32_t credits,
                           uint64_t max_payload_bytes, Transport& transport, BufferPool& pool,
                           uint64_t seed)
    : identity_(identity),
      timings_(timings),
      credits_(credits),
      max_payload_bytes_(max_payload_bytes),
      transport_(transport),
      pool_(pool),
      prng_(seed),
      sessions_(kMaxSessions) {
  CHECK_GT(credits_, 0u);
  CHECK_NE(identity_.node.value(), uint64_t{0});
  CHECK_NE(identity_.incarnation.value(), uint64_t{0});
}

SessionTable::Session* SessionTable::FindSession(uint64_t id) {
  if (id == 0) return nullptr;
  for (Session& session : sessions_) {
    if (session.id == id) return &session;
  }
  return nullptr;
}

SessionTable::Session* SessionTable::FindByConnection(ConnectionId connection) {
  for (Session& session : sessions_) {
    if (session.id != 0 && session.connection == connection) return &session;
  }
  return nullptr;
}

SessionTable::Peer* SessionTable::FindPeer(NodeId node) {
  for (Peer& peer : peers_) {
    if (peer.info.node == node) return &peer;
  }
  return nullptr;
}

SessionTable::Session* SessionTable::SendingSession(NodeId to) {
  if (Peer* peer = FindPeer(to)) {
    Session* session = FindSession(peer->session);
    return session != nullptr && session->up ? session : nullptr;
  }
  // The newest one the peer opened: an older one belongs to a connection that is about to be found
  // dead.
  Session* best = nullptr;
  for (Session& session : sessions_) {
    if (session.id != 0 && session.up && !session.initiator && session.peer == to &&
        (best == nullptr || session.id > best->id)) {
      best = &session;
    }
  }
  return best;
}

SessionTable::Session* SessionTable::NewSession(ConnectionId connection, bool initiator,
                                                TimePoint now) {
  for (Session& session : sessions_) {
    if (session.id != 0) continue;
    session = Session();
    session.id = next_session_id_++;
    session.connection = connection;
    session.initiator = initiator;
    session.last_heard = now;
    session.next_heartbeat = now + timings_.heartbeat_every;
    return &session;
  }
  return nullptr;
}

void SessionTable::Connect(const PeerInfo& info, TimePoint now) {
  CHECK(info.node != identity_.node);
  if (Peer* peer = FindPeer(info.node)) {
    if (peer->info.incarnation == info.incarnation && peer->info.data_address == info.data_address)
      return;
    if (info.incarnation < peer->info.incarnation && info.incarnation.value() != 0)
      return;  // old news
    peer->info = info;
    // The old connection leads to an old incarnation or address; its loss dials the new one.
    Session* session = FindSession(peer->session);
    if (session != nullptr) {
      transport_.Close(session->connection);
    } else {
      peer->waiting_to_retry = false;
      peer->backoff = timings_.reconnect_min;
      Dial(*peer, now);
    }
    return;
  }
  Peer peer;
  peer.info = info;
  peer.backoff = timings_.reconnect_min;
  peers_.push_back(peer);
  Dial(peers_.back(), now);
}

void SessionTable::Disconnect(NodeId node) {
  Peer* peer = FindPeer(node);
  if (peer == nullptr) return;
  if (Session* session = FindSession(peer->session)) {
    transport_.Close(session->connection);
    *session = Session();
    ++counters_.sessions_closed;
  }
  peers_.erase(peers_.begin() + (peer - peers_.data()));
}

void SessionTable::Dial(Peer& peer, TimePoint now) {
  const ConnectionId connection = transport_.Connect(peer.info.data_address);
  Session* session = NewSession(connection, /*initiator=*/true, now);
  if (session == nullptr) {  // every slot is taken: try again later
    transport_.Close(connection);
    peer.waiting_to_retry = true;
    peer.retry_at = now + timings_.reconnect_max;
    return;
  }
  session->peer = peer.info.node;
  peer.session = session->id;
  peer.waiting_to_retry = false;
}

SendResult SessionTable::SendSealed(Session& session, Frame& frame) {
  wire::FrameHeader& header = frame.header;
  header.model_digest = session.up ? identity_.model_digest.low : 0;
  header.source_node = identity_.node.value();
  header.source_incarnation = identity_.incarnation.value();
  header.destination_incarnation = session.peer_incarnation.value();
  header.sequence = session.next_sequence;
  header.acknowledged = session.received_data;
  wire::SealFrame(header, frame.payload.bytes());
  const uint64_t bytes = sizeof(header) + frame.payload.size();
  const SendResult result = transport_.Send(session.connection, frame);
  if (result == SendResult::kSent) {
    ++session.next_sequence;
    session.acknowledged_by_us = session.received_data;
    ++counters_.frames_sent;
    counters_.bytes_sent += bytes;
  }
  return result;
}

bool SessionTable::SendControl(Session& session, wire::FrameType type, Frame frame) {
  frame.header.type = static_cast<uint16_t>(type);
  return SendSealed(session, frame) == SendResult::kSent;
}

void SessionTable::SendHello(Session& session, wire::FrameType type, const PeerInfo* expected) {
  wire::HelloRecord record;
  record.node = identity_.node.value();
  record.incarnation = identity_.incarnation.value();
  record.expected_node = session.peer.value();
  record.expected_incarnation = expected != nullptr ? expected->incarnation.value() : 0;
  record.model_digest_low = identity_.model_digest.low;
  record.model_digest_high = identity_.model_digest.high;
  record.numerics_class = identity_.numerics_class;
  record.max_payload_bytes = max_payload_bytes_;
  record.credits = credits_;
  record.role = static_cast<uint16_t>(identity_.role);
  std::optional<Buffer> buffer = pool_.Acquire(sizeof(record));
  if (!buffer) return;  // the handshake times out and is tried again
  std::memcpy(buffer->data(), &record, sizeof(record));
  Frame frame;
  frame.payload = std::move(*buffer);
  SendControl(session, type, std::move(frame));
}

SendResult SessionTable::Send(NodeId to, Frame& frame) {
  Session* session = SendingSession(to);
  if (session == nullptr) return SendResult::kUnreachable;
  if (frame.payload.size() > session->peer_max_payload) return SendResult::kUnreachable;
  if (session->sent_data - session->acknowledged_by_peer >= session->send_credits) {
    session->busy_reported = true;
    return SendResult::kBusy;
  }
  const SendResult result = SendSealed(*session, frame);
  if (result == SendResult::kSent) ++session->sent_data;
  if (result == SendResult::kBusy) session->busy_reported = true;
  return result;
}

void SessionTable::Drop(Session& session, const std::string& reason, TimePoint now,
                        SessionEvents& events) {
  transport_.Close(session.connection);
  const uint64_t id = session.id;
  const NodeId node = session.peer;
  const Incarnation incarnation = session.peer_incarnation;
  const bool initiator = session.initiator;
  if (session.up) ++counters_.sessions_closed;
  // Whoever waits for this session must find out: over an accepted one no LinkChanged comes.
  if (session.busy_reported) events.push_back(Writable{node});
  session = Session();
  if (!initiator) return;
  Peer* peer = FindPeer(node);
  if (peer == nullptr || peer->session != id) return;
  peer->session = 0;
  peer->waiting_to_retry = true;
  // Full jitter keeps a crowd of survivors from dialling a restarted peer in step.
  const uint64_t half = static_cast<uint64_t>(peer->backoff.count()) / 2;
  peer->retry_at = now + Duration(half + prng_.Below(half + 1));
  peer->backoff = std::min(peer->backoff * 2, timings_.reconnect_max);
  next_tick_ = std::min(next_tick_, peer->retry_at);
  events.push_back(LinkChanged{node, incarnation, LinkState::kDown, reason});
}

void SessionTable::OnTransportEvent(TransportEvent& event, TimePoint now, SessionEvents& events) {
  using Kind = TransportEvent::Kind;
  if (event.kind == Kind::kAccepted) {
    Session* session = NewSession(event.connection, /*initiator=*/false, now);
    if (session == nullptr) transport_.Close(event.connection);  // bounded: refuse
    next_tick_ = std::min(next_tick_, now + timings_.heartbeat_every);
    return;
  }
  Session* session = FindByConnection(event.connection);
  if (session == nullptr) return;  // late news of a connection we dropped
  switch (event.kind) {
    case Kind::kConnected: {
      const Peer* peer = FindPeer(session->peer);
      session->last_heard = now;
      SendHello(*session, wire::FrameType::kHello, peer != nullptr ? &peer->info : nullptr);
      break;
    }
    case Kind::kClosed:
      Drop(*session, std::string(event.status.message()), now, events);
      break;
    case Kind::kFrame:
      OnFrame(*session, std::move(event.frame), now, events);
      break;
    case Kind::kWritable:
      if (session->busy_reported) {
        session->busy_reported = false;
        events.push_back(Writable{session->peer});
      }
      break;
    case Kind::kAccepted:
      break;
  }
}

absl::Status SessionTable::CheckHello(const Session& session,
                                      const wire::HelloRecord& record) const {
  if (record.model_digest_low != identity_.model_digest.low ||
      record.model_digest_high != identity_.model_digest.high) {
    return absl::FailedPreconditionError("model digest differs: the peer serves another model");
  }
  if (record.numerics_class != identity_.numerics_class) {
    return absl::FailedPreconditionError(
        "numerics class differs: the peer's bits would not equal ours");
  }
  if (record.expected_node != 0 && record.expected_node != identity_.node.value()) {
    return absl::FailedPreconditionError(absl::StrCat("peer looks for node ", record.expected_node,
                                                      ", this is ", identity_.node.value()));
  }
  if (!session.initiator && record.expected_incarnation != 0 &&
      record.expected_incarnation != identity_.incarnation.value()) {
    return absl::FailedPreconditionError(absl::StrCat("peer looks for incarnation ",
                                                      record.expected_incarnation, ", this is ",
                                                      identity_.incarnation.value()));
  }
  if (session.initiator && record.node != session.peer.value()) {
    return absl::FailedPreconditionError(
        absl::StrCat("node ", record.node, " answers in place of ", session.peer.value()));
  }
  return absl::OkStatus();
}

void SessionTable::OnHello(Session& session, const Frame& frame, TimePoint now,
                           SessionEvents& events) {
  wire::HelloRecord record;
  absl::Status status = wire::ParseHello(frame.payload.bytes(), &record);
  if (status.ok() && session.up) status = absl::InvalidArgumentError("second hello");
  if (status.ok()) status = CheckHello(session, record);
  Peer* peer = session.initiator ? FindPeer(session.peer) : nullptr;
  if (status.ok() && peer != nullptr && peer->info.incarnation.value() != 0 &&
      peer->info.incarnation.value() != record.incarnation) {
    status =
        absl::FailedPreconditionError(absl::StrCat("incarnation ", record.incarnation, " answers, ",
                                                   peer->info.incarnation.value(), " was meant"));
  }
  if (status.ok() && !session.initiator) {
    for (const Session& other : sessions_) {
      if (other.id == 0 || !other.up || other.initiator || other.peer.value() != record.node ||
          other.peer_incarnation.value() <= record.incarnation) {
        continue;
      }
      // A zombie: a process that was taken for dead and replaced meanwhile. It gets no answer.
      ++counters_.refused_handshakes;
      ++counters_.fenced_frames;
      Drop(session, "incarnation older than the one connected", now, events);
      return;
    }
  }
  if (!status.ok()) {
    ++counters_.refused_handshakes;
    LOG_WARNING(absl::StrCat("handshake with node ", record.node, " refused: ", status.message()));
    if (!session.initiator && !session.up) {
      // The answer tells the other side what we are, so that its own check gives it the reason;
      // closing at once could lose the answer. The session never comes up and Tick ends it.
      session.peer_incarnation = Incarnation(record.incarnation);
      session.refused = true;
      SendHello(session, wire::FrameType::kHelloReply, nullptr);
      return;
    }
    Drop(session, std::string(status.message()), now, events);
    return;
  }
  session.peer = NodeId(record.node);
  session.peer_incarnation = Incarnation(record.incarnation);
  session.send_credits = record.credits;
  session.peer_max_payload = record.max_payload_bytes;
  session.last_heard = now;
  session.next_heartbeat = now;
  next_tick_ = now;
  if (!session.initiator) {
    // A newer incarnation of the same node replaces what the old one left behind.
    for (Session& other : sessions_) {
      if (other.id != 0 && &other != &session && !other.initiator && other.up &&
          other.peer == session.peer && other.peer_incarnation != session.peer_incarnation) {
        Drop(other, "replaced by a newer incarnation", now, events);
      }
    }
    SendHello(session, wire::FrameType::kHelloReply, nullptr);
    session.up = true;
  } else {
    session.up = true;
    peer->backoff = timings_.reconnect_min;
    events.push_back(
        LinkChanged{session.peer, session.peer_incarnation, LinkState::kUp, "connected"});
  }
  ++counters_.sessions_opened;
}

void SessionTable::ApplyAcknowledged(Session& session, uint64_t acknowledged,
                                     SessionEvents& events) {
  session.acknowledged_by_peer = std::max(session.acknowledged_by_peer, acknowledged);
  if (session.busy_reported &&
      session.sent_data - session.acknowledged_by_peer < session.send_credits) {
    session.busy_reported = false;
    events.push_back(Writable{session.peer});
  }
}

void SessionTable::OnFrame(Session& session, Frame frame, TimePoint now, SessionEvents& events) {
  if (session.refused) {
    Drop(session, "frame after the handshake was refused", now, events);
    return;
  }
  wire::FrameHeader header;
  const absl::Status valid =
      wire::ValidateFrame({reinterpret_cast<const std::byte*>(&frame.header), sizeof(frame.header)},
                          frame.payload.bytes(), max_payload_bytes_, &header);
  if (absl::IsFailedPrecondition(valid)) {  // another protocol version
    ++counters_.refused_handshakes;
    if (session.initiator || session.up) {
      Drop(session, std::string(valid.message()), now, events);
    } else {
      session.refused = true;
      SendHello(session, wire::FrameType::kHelloReply, nullptr);  // names ours
    }
    return;
  }
  if (!valid.ok()) {
    // After a damaged frame nothing that follows on this connection can be trusted.
    ++counters_.checksum_failures;
    Drop(session, std::string(valid.message()), now, events);
    return;
  }
  if (header.sequence != session.received_sequence + 1) {
    Drop(session, absl::StrCat("frame ", header.sequence, " after ", session.received_sequence),
         now, events);
    return;
  }
  session.received_sequence = header.sequence;
  session.last_heard = now;
  ++counters_.frames_received;
  counters_.bytes_received += sizeof(header) + header.payload_bytes;
  const auto type = static_cast<wire::FrameType>(header.type);
  if (type == wire::FrameType::kHello || type == wire::FrameType::kHelloReply) {
    if ((type == wire::FrameType::kHello) == session.initiator) {
      Drop(session, "hello from the wrong side", now, events);
      return;
    }
    OnHello(session, frame, now, events);
    return;
  }
  if (!session.up) {
    Drop(session, "frame before the handshake", now, events);
    return;
  }
  if (header.source_node != session.peer.value() ||
      header.source_incarnation != session.peer_incarnation.value() ||
      header.destination_incarnation != identity_.incarnation.value() ||
      header.model_digest != identity_.model_digest.low) {
    ++counters_.fenced_frames;
    Drop(session, "frame of another incarnation or model", now, events);
    return;
  }
  if (header.acknowledged > session.sent_data) {
    Drop(session, "acknowledges frames that were not sent", now, events);
    return;
  }
  ApplyAcknowledged(session, header.acknowledged, events);
  if (type == wire::FrameType::kHeartbeat || type == wire::FrameType::kHeartbeatReply) {
    const absl::Status bare = wire::ValidateHeartbeat(header);
    if (!bare.ok()) {
      Drop(session, std::string(bare.message()), now, events);
      return;
    }
    if (type == wire::FrameType::kHeartbeat) {
      Frame reply;
      reply.header.correlation = header.correlation;
      SendControl(session, wire::FrameType::kHeartbeatReply, std::move(reply));
      return;
    }
    // Only an answer to the oldest open question (or a later one) proves that the link is well.
    if (session.heartbeat_pending && header.correlation >= session.pending_number) {
      session.heartbeat_pending = false;
      UpdateLinkState(session, now, events);
    }
    return;
  }
  if (IsControl(header.type)) return;
  if (++session.arrived_data - session.acknowledged_by_us > credits_) {
    Drop(session, "more frames than credits", now, events);
    return;
  }
  events.push_back(InboundFrame{
      session.id, FrameReceived{ActorAddress{session.peer, ActorId(header.source_actor)},
                                session.peer_incarnation, std::move(frame)}});
}

void SessionTable::Acknowledge(uint64_t id) {
  Session* session = FindSession(id);
  if (session == nullptr) return;
  ++session->received_data;
  if (session->received_data - session->acknowledged_by_us >= std::max<uint64_t>(1, credits_ / 2)) {
    SendControl(*session, wire::FrameType::kAcknowledge);
  }
}

void SessionTable::Refuse(uint64_t id, const std::string& reason, TimePoint now,
                          SessionEvents& events) {
  if (Session* session = FindSession(id)) Drop(*session, reason, now, events);
}

std::optional<LinkChanged> SessionTable::LinkTo(NodeId node) const {
  for (const Session& session : sessions_) {
    if (session.id == 0 || !session.initiator || !session.up || session.peer != node) continue;
    return LinkChanged{node, session.peer_incarnation, session.state, "connected before"};
  }
  return std::nullopt;
}

void SessionTable::UpdateLinkState(Session& session, TimePoint now, SessionEvents& events) {
  LinkState state = LinkState::kUp;
  if (session.heartbeat_pending) {
    const Duration silent = now - session.oldest_unanswered;
    if (silent >= timings_.suspect_after) {
      state = LinkState::kSuspect;
    } else if (silent >= timings_.slow_after) {
      state = LinkState::kSlow;
    }
  }
  if (state == session.state) return;
  session.state = state;
  const char* reason = state == LinkState::kUp ? "answers again" : "no heartbeat answer";
  events.push_back(LinkChanged{session.peer, session.peer_incarnation, state, reason});
}

// If this node did not run for a while, answers may lie unread: nobody else was silent meanwhile.
void SessionTable::ForgiveOwnStall(TimePoint now) {
  const Duration late = now - last_tick_ - timings_.heartbeat_every;
  const bool stalled = last_tick_.ns != 0 && late > timings_.heartbeat_every;
  last_tick_ = now;
  if (!stalled) return;
  for (Session& session : sessions_) {
    if (session.id == 0) continue;
    session.last_heard = std::min(now, session.last_heard + late);
    session.oldest_unanswered = std::min(now, session.oldest_unanswered + late);
  }
}

// When silence next changes the link's state.
TimePoint SessionTable::NextThreshold(const Session& session, TimePoint now) const {
  for (Duration after : {timings_.slow_after, timings_.suspect_after, timings_.dead_after}) {
    const TimePoint at = session.oldest_unanswered + after;
    if (at > now) return at;
  }
  return now + timings_.heartbeat_every;
}

void SessionTable::Tick(TimePoint now, SessionEvents& events) {
  ForgiveOwnStall(now);
  TimePoint next = now + timings_.heartbeat_every;
  for (Session& session : sessions_) {
    if (session.id == 0) continue;
    if (!session.initiator || !session.up) {
      // An accepted session, or a handshake in progress: silence for too long ends it.
      if (now - session.last_heard >= timings_.dead_after) {
        Drop(session, session.up ? "silent" : "no handshake", now, events);
        continue;
      }
    }
    if (session.initiator && session.up) {
      if (session.heartbeat_pending && now - session.oldest_unanswered >= timings_.dead_after) {
        Drop(session, "no heartbeat answer", now, events);
        continue;
      }
      UpdateLinkState(session, now, events);
      if (now >= session.next_heartbeat) {
        Frame heartbeat;
        const uint64_t number = session.heartbeat_number + 1;
        heartbeat.header.correlation = number;
        const bool sent = SendControl(session, wire::FrameType::kHeartbeat, std::move(heartbeat));
        // Not being able to send is silence too: the clock starts with the first attempt.
        if (!session.heartbeat_pending) {
          session.heartbeat_pending = true;
          session.pending_number = number;
          session.oldest_unanswered = now;
        }
        if (sent) session.heartbeat_number = number;
        session.next_heartbeat = now + timings_.heartbeat_every;
      }
      next = std::min(next, session.next_heartbeat);
      if (session.heartbeat_pending) next = std::min(next, NextThreshold(session, now));
    }
  }
  for (Peer& peer : peers_) {
    if (!peer.waiting_to_retry) continue;
    if (now >= peer.retry_at) {
      Dial(peer, now);
    } else {
      next = std::min(next, peer.retry_at);
    }
  }
  next_tick_ = next;
}

uint64_t SessionTable::outstanding_frames() const {
  uint64_t total = 0;
  for (const Session& session : sessions_) {
    if (session.id != 0 && session.up) total += session.sent_data - session.acknowledged_by_peer;
  }
  return total;
}

}  // namespace moebius::runtime
