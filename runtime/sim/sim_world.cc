#include "runtime/sim/sim_world.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/check.h"

namespace moebius::runtime::sim {

std::string SimTransport::ListenAddress() const { return SimWorld::AddressOf(self_); }
ConnectionId SimTransport::Connect(const std::string& address) {
  return world_.Open(self_, address);
}
SendResult SimTransport::Send(ConnectionId connection, Frame& frame) {
  return world_.Transmit(connection, frame);
}
void SimTransport::Close(ConnectionId connection) { world_.CloseFrom(connection, "closed here"); }
void SimTransport::Poll(std::vector<TransportEvent>& events) {
  for (TransportEvent& event : inbox_) events.push_back(std::move(event));
  inbox_.clear();
}

SimWorld::SimWorld(uint64_t seed, SimOptions options) : options_(options), prng_(seed) {
  clock_.now = TimePoint{1'000'000'000};
}

SimWorld::~SimWorld() = default;

std::string SimWorld::AddressOf(NodeId node) { return absl::StrCat("sim:", node.value()); }

Duration SimWorld::RandomIn(Duration low, Duration high) {
  return low + Duration(prng_.Below(static_cast<uint64_t>((high - low).count()) + 1));
}

Duration SimWorld::RandomDelay() { return RandomIn(options_.delay_min, options_.delay_max); }

void SimWorld::At(TimePoint time, std::function<void()> run) {
  events_.push(Event{time, next_sequence_++, std::move(run)});
}

void SimWorld::Schedule(Duration after, std::function<void()> event) {
  At(clock_.now + after, std::move(event));
}

void SimWorld::Boot(Host& host, NodeId id) {
  ++host.incarnation;
  host.pool = std::make_unique<BufferPool>(host.buffers, options_.buffer_fill);
  host.transport = std::make_unique<SimTransport>(*this, id);
  if (!host.build) return;
  NodeOptions options = host.options;
  options.identity.node = id;
  options.identity.incarnation = Incarnation(host.incarnation);
  options.seed = prng_.Next();
  options.simulated_compute_delay = [this] {
    return RandomIn(options_.compute_min, options_.compute_max);
  };
  host.node = std::make_unique<Node>(std::move(options), *host.transport, clock_, *host.pool);
  host.build(*host.node);
}

Node& SimWorld::AddNode(NodeId id, NodeOptions options, std::vector<BufferClass> buffers,
                        Build build) {
  CHECK(hosts_.find(id) == hosts_.end());
  Host& host = hosts_[id];
  host.options = std::move(options);
  host.buffers = std::move(buffers);
  host.build = std::move(build);
  Boot(host, id);
  return *host.node;
}

SimTransport& SimWorld::AddBareTransport(NodeId id, std::vector<BufferClass> buffers) {
  CHECK(hosts_.find(id) == hosts_.end());
  Host& host = hosts_[id];
  host.buffers = std::move(buffers);
  Boot(host, id);
  return *host.transport;
}

Node& SimWorld::node(NodeId id) {
  CHECK(hosts_.at(id).node != nullptr);
  return *hosts_.at(id).node;
}
bool SimWorld::alive(NodeId id) const { return hosts_.at(id).transport != nullptr; }
BufferPool& SimWorld::pool(NodeId id) { return *hosts_.at(id).pool; }

SimTransport* SimWorld::TransportOf(NodeId id) {
  const auto it = hosts_.find(id);
  return it == hosts_.end() ? nullptr : it->second.transport.get();
}

void SimWorld::PushEvent(NodeId to, TransportEvent event) {
  if (SimTransport* transport = TransportOf(to)) transport->inbox_.push_back(std::move(event));
}

void SimWorld::Crash(NodeId id) {
  Host& host = hosts_.at(id);
  CHECK(host.transport != nullptr);
  const bool silent = prng_.Unit() < options_.silent_crash_probability;
  host.node.reset();
  host.transport.reset();
  host.pool.reset();
  for (auto& [number, connection] : connections_) {
    for (int side = 0; side < 2; ++side) {
      if (connection.ends[side] != id) continue;
      connection.open[side] = false;
      LoseSuffix(connection.direction[side]);
      if (!silent) NoticeClose(number, 1 - side, "peer died");
    }
  }
}

void SimWorld::Restart(NodeId id) {
  Host& host = hosts_.at(id);
  CHECK(host.transport == nullptr);
  Boot(host, id);
}

void SimWorld::Partition(NodeId from, NodeId to) { partitions_.insert({from, to}); }

void SimWorld::Heal(NodeId from, NodeId to) {
  partitions_.erase({from, to});
  for (auto& [number, connection] : connections_) {
    for (int side = 0; side < 2; ++side) {
      Direction& direction = connection.direction[side];
      if (!direction.held || connection.ends[side] != from || connection.ends[1 - side] != to)
        continue;
      direction.held = false;
      for (size_t i = 0; i < direction.flights.size(); ++i) {
        At(clock_.now + RandomDelay(), [this, n = number, side] { DeliverNext(n, side); });
      }
    }
  }
}

void SimWorld::HealAll() {
  const std::set<std::pair<NodeId, NodeId>> all = partitions_;
  for (const auto& [from, to] : all) Heal(from, to);
}

void SimWorld::Break(NodeId a, NodeId b) {
  for (auto& [number, connection] : connections_) {
    const bool between = (connection.ends[0] == a && connection.ends[1] == b) ||
                         (connection.ends[0] == b && connection.ends[1] == a);
    if (!between) continue;
    for (int side = 0; side < 2; ++side) {
      if (!connection.open[side]) continue;
      LoseSuffix(connection.direction[side]);
      NoticeClose(number, side, "connection broke");
    }
  }
}

// What was in flight when a connection ends: a random part of it still arrives.
void SimWorld::LoseSuffix(Direction& direction) {
  const size_t kept = prng_.Below(direction.flights.size() + 1);
  direction.flights.resize(kept);
}

void SimWorld::NoticeClose(uint64_t number, int side, const std::string& reason) {
  // After everything that still arrives on this side, at a time of its own.
  const Connection& connection = connections_.at(number);
  const TimePoint floor = connection.direction[1 - side].floor;
  const TimePoint at =
      std::max(floor, clock_.now + RandomIn(options_.delay_min, options_.close_notice_max));
  At(at, [this, number, side, reason] {
    Connection& c = connections_.at(number);
    if (!c.open[side]) return;
    if (Partitioned(c.ends[1 - side], c.ends[side])) return;  // the news does not get through
    c.open[side] = false;
    c.direction[1 - side].flights.clear();
    TransportEvent event;
    event.kind = TransportEvent::Kind::kClosed;
    event.connection = Handle(number, side);
    event.status = absl::UnavailableError(reason);
    PushEvent(c.ends[side], std::move(event));
  });
}

ConnectionId SimWorld::Open(NodeId from, const std::string& address) {
  const uint64_t number = next_connection_++;
  uint64_t target = 0;
  const bool parsed = absl::SimpleAtoi(absl::StripPrefix(address, "sim:"), &target);
  Connection& connection = connections_[number];
  connection.ends[0] = from;
  connection.ends[1] = NodeId(parsed ? target : 0);
  connection.open[0] = true;
  At(clock_.now + RandomDelay(), [this, number] {
    Connection& c = connections_.at(number);
    if (!c.open[0]) return;
    // A SYN into a partition is lost: the handshake's own timeout deals with it.
    if (Partitioned(c.ends[0], c.ends[1]) || Partitioned(c.ends[1], c.ends[0])) return;
    if (TransportOf(c.ends[1]) == nullptr) {
      NoticeClose(number, 0, "connection refused");
      return;
    }
    c.open[1] = true;
    TransportEvent accepted;
    accepted.kind = TransportEvent::Kind::kAccepted;
    accepted.connection = Handle(number, 1);
    PushEvent(c.ends[1], std::move(accepted));
    At(clock_.now + RandomDelay(), [this, number] {
      Connection& established = connections_.at(number);
      if (!established.open[0]) return;
      TransportEvent connected;
      connected.kind = TransportEvent::Kind::kConnected;
      connected.connection = Handle(number, 0);
      PushEvent(established.ends[0], std::move(connected));
    });
  });
  return Handle(number, 0);
}

SendResult SimWorld::Transmit(ConnectionId handle, Frame& frame) {
  const uint64_t number = handle / 2;
  const int side = static_cast<int>(handle % 2);
  const auto it = connections_.find(number);
  if (it == connections_.end() || !it->second.open[side]) return SendResult::kUnreachable;
  Direction& direction = it->second.direction[side];
  if (direction.flights.size() >= options_.frames_in_flight_max) {
    direction.sender_blocked = true;
    return SendResult::kBusy;
  }
  Flight flight;
  flight.header = frame.header;
  flight.payload.assign(frame.payload.data(), frame.payload.data() + frame.payload.size());
  frame = Frame();  // the send completes here: the buffer is free, whatever becomes of the frame
  direction.flights.push_back(std::move(flight));
  TimePoint at = clock_.now + RandomDelay();
  if (options_.stall_probability > 0 && prng_.Unit() < options_.stall_probability) {
    at = at + RandomIn(Duration::zero(), options_.stall_max);
  }
  direction.floor = std::max(direction.floor, at);
  At(direction.floor, [this, number, side] { DeliverNext(number, side); });
  return SendResult::kSent;
}

void SimWorld::DeliverNext(uint64_t number, int side) {
  Connection& connection = connections_.at(number);
  Direction& direction = connection.direction[side];
  if (direction.flights.empty()) return;  // lost with its connection
  const NodeId from = connection.ends[side];
  const NodeId to = connection.ends[1 - side];
  if (!connection.open[1 - side] || TransportOf(to) == nullptr) {
    direction.flights.clear();
    return;
  }
  if (Partitioned(from, to)) {
    direction.held = true;
    return;
  }
  Flight& flight = direction.flights.front();
  TransportEvent event;
  event.kind = TransportEvent::Kind::kFrame;
  event.connection = Handle(number, 1 - side);
  event.frame.header = flight.header;
  if (!flight.payload.empty()) {
    std::optional<Buffer> buffer = pool(to).Acquire(flight.payload.size());
    if (!buffer) {
      if (flight.payload.size() > pool(to).max_buffer_bytes()) {
        NoticeClose(number, 0, "payload over the limit");
        NoticeClose(number, 1, "payload over the limit");
        return;
      }
      // The receiver has no buffer: the frame waits, as in a full socket.
      At(clock_.now + std::chrono::microseconds(50),
         [this, number, side] { DeliverNext(number, side); });
      return;
    }
    std::memcpy(buffer->data(), flight.payload.data(), flight.payload.size());
    event.frame.payload = std::move(*buffer);
  }
  if (options_.corrupt_probability > 0 && prng_.Unit() < options_.corrupt_probability) {
    const size_t bits = 8 * (sizeof(wire::FrameHeader) + flight.payload.size());
    const size_t bit = prng_.Below(bits);
    auto* bytes = bit < 8 * sizeof(wire::FrameHeader)
                      ? reinterpret_cast<std::byte*>(&event.frame.header)
                      : event.frame.payload.data();
    const size_t at =
        bit < 8 * sizeof(wire::FrameHeader) ? bit : bit - 8 * sizeof(wire::FrameHeader);
    bytes[at / 8] ^= std::byte{1} << (at % 8);
  }
  trace_hash_ = Mix64(trace_hash_ ^ flight.header.checksum ^ static_cast<uint64_t>(clock_.now.ns) ^
                      Mix64(from.value() * 1000 + to.value()));
  ++frames_delivered_;
  direction.flights.pop_front();
  PushEvent(to, std::move(event));
  if (direction.sender_blocked && connection.open[side]) {
    direction.sender_blocked = false;
    TransportEvent writable;
    writable.kind = TransportEvent::Kind::kWritable;
    writable.connection = Handle(number, side);
    PushEvent(from, std::move(writable));
  }
}

void SimWorld::CloseFrom(ConnectionId handle, const std::string& reason) {
  const uint64_t number = handle / 2;
  const int side = static_cast<int>(handle % 2);
  const auto it = connections_.find(number);
  if (it == connections_.end() || !it->second.open[side]) return;
  Connection& connection = it->second;
  connection.open[side] = false;
  connection.direction[1 - side].flights.clear();
  LoseSuffix(connection.direction[side]);
  TransportEvent event;
  event.kind = TransportEvent::Kind::kClosed;
  event.connection = handle;
  event.status = absl::CancelledError(reason);
  PushEvent(connection.ends[side], std::move(event));
  if (connection.open[1 - side]) NoticeClose(number, 1 - side, "closed by peer");
}

bool SimWorld::Step(TimePoint limit) {
  TimePoint next = limit + Duration(1);
  if (!events_.empty()) next = std::min(next, events_.top().at);
  for (auto& [id, host] : hosts_) {
    if (host.node != nullptr) next = std::min(next, host.node->NextWake());
  }
  if (next > limit) {
    clock_.now = limit;
    return false;
  }
  clock_.now = std::max(clock_.now, next);
  while (!events_.empty() && events_.top().at <= clock_.now) {
    // Moving out of a priority queue's top is safe: it is popped before anything compares it.
    Event event = std::move(const_cast<Event&>(events_.top()));
    events_.pop();
    event.run();
  }
  for (auto& [id, host] : hosts_) {
    if (host.node == nullptr) continue;
    int turns = 0;
    while (host.node->RunOnce()) CHECK_LT(++turns, 100000);  // a livelock at one point of time
  }
  return true;
}

bool SimWorld::RunUntil(const std::function<bool()>& done, Duration limit) {
  const TimePoint end = clock_.now + limit;
  while (!done()) {
    if (!Step(end)) return done();
  }
  return true;
}

void SimWorld::RunFor(Duration time) {
  const TimePoint end = clock_.now + time;
  while (Step(end)) {
  }
}

}  // namespace moebius::runtime::sim
