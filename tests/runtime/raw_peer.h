#pragma once

// A peer made by hand, for tests of sessions: it says whatever a test wants it to say, in raw
// frames over the simulated network, to a node that must survive it.

#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "runtime/sim/sim_world.h"

namespace moebius::runtime::session_test {

inline constexpr NodeId kNode{1};
inline constexpr NodeId kPeer{2};
inline constexpr ActorId kActor = kFirstTestActor;
inline constexpr uint64_t kModel = 77;
inline constexpr uint64_t kNumerics = 9;

// Options of a node that agrees with RawPeer::GoodHello.
inline NodeOptions Agreed() {
  NodeOptions options;
  options.identity.model_digest = {kModel, kModel + 1};
  options.identity.numerics_class = kNumerics;
  return options;
}

class RawPeer {
 public:
  RawPeer(sim::SimWorld& world, NodeId id)
      : world_(world), id_(id), transport_(world.transport(id)) {}

  void Dial() {
    connection_ = transport_->Connect(sim::SimWorld::AddressOf(kNode));
    sequence_ = 0;
    closed = false;
    inbox.clear();
    Wait();
  }
  void Wait(Duration time = std::chrono::milliseconds(2)) {
    world_.RunFor(time);
    std::vector<TransportEvent> events;
    transport_->Poll(events);
    for (TransportEvent& event : events) {
      if (event.kind == TransportEvent::Kind::kAccepted) connection_ = event.connection;
      if (event.connection != connection_) continue;
      if (event.kind == TransportEvent::Kind::kClosed) closed = true;
      if (event.kind == TransportEvent::Kind::kFrame) inbox.push_back(std::move(event.frame));
    }
  }
  wire::HelloRecord GoodHello() const {
    wire::HelloRecord hello;
    hello.node = id_.value();
    hello.incarnation = incarnation;
    hello.expected_node = kNode.value();
    hello.model_digest_low = kModel;
    hello.model_digest_high = kModel + 1;
    hello.numerics_class = kNumerics;
    hello.max_payload_bytes = 4096;
    hello.credits = 4;
    return hello;
  }
  wire::FrameHeader Header(wire::FrameType type, uint64_t correlation) {
    wire::FrameHeader header;
    header.type = static_cast<uint16_t>(type);
    header.model_digest = kModel;
    header.source_node = id_.value();
    header.source_incarnation = incarnation;
    header.destination_incarnation = 1;
    header.destination_actor = kActor.value();
    header.correlation = correlation;
    header.sequence = ++sequence_;
    return header;
  }
  // Seals unless told not to: a test of damage wants the old checksum.
  SendResult Send(wire::FrameHeader header, absl::Span<const std::byte> payload = {},
                  bool seal = true) {
    Frame frame;
    frame.header = header;
    if (!payload.empty()) {
      frame.payload = *world_.pool(id_).Acquire(payload.size());
      std::memcpy(frame.payload.data(), payload.data(), payload.size());
    }
    if (seal) wire::SealFrame(frame.header, frame.payload.bytes());
    return transport_->Send(connection_, frame);
  }
  void SayHello(const wire::HelloRecord& hello, wire::FrameType type = wire::FrameType::kHello) {
    wire::FrameHeader header = Header(type, 0);
    header.model_digest = 0;
    header.destination_incarnation = 0;
    Send(header, {reinterpret_cast<const std::byte*>(&hello), sizeof(hello)});
  }
  // Dials and shakes hands properly.
  void Join() {
    Dial();
    SayHello(GoodHello());
    Wait();
  }
  size_t Received(wire::FrameType type) const {
    size_t count = 0;
    for (const Frame& frame : inbox) {
      count += frame.header.type == static_cast<uint16_t>(type) ? 1 : 0;
    }
    return count;
  }
  void Close() { transport_->Close(connection_); }

  uint64_t incarnation = 5;
  bool closed = false;
  std::vector<Frame> inbox;

 private:
  sim::SimWorld& world_;
  NodeId id_;
  sim::SimTransport* transport_;
  ConnectionId connection_ = 0;
  uint64_t sequence_ = 0;
};

}  // namespace moebius::runtime::session_test
