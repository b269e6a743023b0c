#pragma once

// A cluster in one thread: virtual clock, seeded event queue, a network that fails as UCX over TCP
// does, and the same Node, session and actor code as in production. The same seed gives the same
// run, event by event (trace_hash proves it).
//
//   SimWorld world(seed, SimOptions{});
//   world.AddNode(NodeId(1), options, buffers, [&](Node& node) { node.AddActor(...); });
//   world.Schedule(1ms, [&] { world.Crash(NodeId(2)); });
//   ASSERT_TRUE(world.RunUntil([&] { return done; }, 30s)) << "seed " << seed;
//
// The network: frames of one connection arrive in order after a random delay; different connections
// reorder freely. A send completes at once and may never arrive (the connection broke, the peer
// died). A broken connection loses a random suffix of what was in flight and is reported to each
// side at its own time. A one-way partition holds frames back, as TCP does, until it heals or the
// connection is closed; nothing is reported. Compute takes a random virtual time.
//
// Single-threaded. Nodes are destroyed with the world.

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <set>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/prng.h"
#include "runtime/buffer_pool.h"
#include "runtime/clock.h"
#include "runtime/node.h"
#include "runtime/transport.h"

namespace moebius::runtime::sim {

struct SimOptions {
  Duration delay_min = std::chrono::microseconds(5);
  Duration delay_max = std::chrono::microseconds(300);
  double stall_probability = 0.0;  // of a frame: its connection then pauses for up to stall_max
  Duration stall_max = std::chrono::milliseconds(20);
  double corrupt_probability = 0.0;  // of a frame: one bit flips on the way
  double silent_crash_probability =
      0.0;  // a crash that no peer is told of (host lost, not process)
  Duration close_notice_max = std::chrono::milliseconds(20);
  Duration compute_min = std::chrono::microseconds(10);
  Duration compute_max = std::chrono::microseconds(500);
  std::byte buffer_fill{0xcd};         // what payload buffers hold before anybody writes to them
  uint32_t frames_in_flight_max = 32;  // per connection and direction; then Send says kBusy
};

class SimClock final : public Clock {
 public:
  TimePoint Now() const override { return now; }
  TimePoint now;
};

class SimWorld;

// One node's view of the simulated network.
class SimTransport final : public Transport {
 public:
  SimTransport(SimWorld& world, NodeId self) : world_(world), self_(self) {}
  std::string ListenAddress() const override;
  ConnectionId Connect(const std::string& address) override;
  SendResult Send(ConnectionId connection, Frame& frame) override;
  void Close(ConnectionId connection) override;
  void Poll(std::vector<TransportEvent>& events) override;
  void Wait(Duration) override {}
  void Wake() override {}

 private:
  friend class SimWorld;
  SimWorld& world_;
  NodeId self_;
  std::vector<TransportEvent> inbox_;
};

class SimWorld {
 public:
  using Build = std::function<void(Node&)>;

  explicit SimWorld(uint64_t seed, SimOptions options = {});
  ~SimWorld();

  // Where a peer of that node id listens (for PeerInfo::data_address).
  static std::string AddressOf(NodeId node);

  // `options.identity.node` and the compute delay are filled in; `build` adds the actors, again at
  // each restart (then with an incarnation one higher).
  Node& AddNode(NodeId id, NodeOptions options, std::vector<BufferClass> buffers, Build build);
  Node& node(NodeId id);
  bool alive(NodeId id) const;
  BufferPool& pool(NodeId id);
  // A bare transport without a node (conformance tests of the simulated network itself).
  SimTransport& AddBareTransport(NodeId id, std::vector<BufferClass> buffers);
  SimTransport* transport(NodeId id) { return TransportOf(id); }

  // REQUIRES: alive / not alive. Not from inside an actor: Schedule it.
  void Crash(NodeId id);
  void Restart(NodeId id);
  // Frames from `from` to `to` are held back until Heal.
  void Partition(NodeId from, NodeId to);
  void Heal(NodeId from, NodeId to);
  void HealAll();
  // Breaks every connection between the two.
  void Break(NodeId a, NodeId b);

  void Schedule(Duration after, std::function<void()> event);
  // Runs until `done` holds (checked between events); false if `limit` of virtual time passes
  // first.
  bool RunUntil(const std::function<bool()>& done, Duration limit);
  void RunFor(Duration time);

  TimePoint Now() const { return clock_.now; }
  Clock& clock() { return clock_; }
  Prng& prng() { return prng_; }
  const SimOptions& options() const { return options_; }
  uint64_t trace_hash() const { return trace_hash_; }
  uint64_t frames_delivered() const { return frames_delivered_; }

 private:
  friend class SimTransport;
  struct Flight {
    wire::FrameHeader header;
    std::vector<std::byte> payload;
  };
  struct Direction {
    std::deque<Flight> flights;
    TimePoint floor;  // nothing is delivered before it
    bool sender_blocked = false;
    bool held = false;  // by a partition
  };
  struct Connection {
    NodeId ends[2];  // [0] opened it
    bool open[2] = {false, false};
    Direction direction[2];  // [i]: from ends[i] to the other
  };
  struct Host {
    NodeOptions options;
    std::vector<BufferClass> buffers;
    Build build;
    uint64_t incarnation = 0;
    // Destroyed in reverse: the node's buffers before the pool.
    std::unique_ptr<BufferPool> pool;
    std::unique_ptr<SimTransport> transport;
    std::unique_ptr<Node> node;
  };
  struct Event {
    TimePoint at;
    uint64_t sequence;
    std::function<void()> run;
  };
  struct Later {
    bool operator()(const Event& a, const Event& b) const {
      return a.at != b.at ? a.at > b.at : a.sequence > b.sequence;
    }
  };

  void Boot(Host& host, NodeId id);
  Duration RandomDelay();
  Duration RandomIn(Duration low, Duration high);
  void At(TimePoint time, std::function<void()> run);
  bool Partitioned(NodeId from, NodeId to) const { return partitions_.count({from, to}) > 0; }
  static ConnectionId Handle(uint64_t connection, int side) { return connection * 2 + side; }
  SimTransport* TransportOf(NodeId id);
  void PushEvent(NodeId to, TransportEvent event);

  ConnectionId Open(NodeId from, const std::string& address);
  SendResult Transmit(ConnectionId handle, Frame& frame);
  void CloseFrom(ConnectionId handle, const std::string& reason);
  void DeliverNext(uint64_t connection, int side);
  void LoseSuffix(Direction& direction);
  void NoticeClose(uint64_t connection, int side, const std::string& reason);
  // Executes what is due at the next point of virtual time, if that is before `limit`.
  bool Step(TimePoint limit);

  const SimOptions options_;
  Prng prng_;
  SimClock clock_;
  std::map<NodeId, Host> hosts_;
  std::map<uint64_t, Connection> connections_;
  std::set<std::pair<NodeId, NodeId>> partitions_;
  std::priority_queue<Event, std::vector<Event>, Later> events_;
  uint64_t next_sequence_ = 1;
  uint64_t next_connection_ = 1;
  uint64_t trace_hash_ = 0;
  uint64_t frames_delivered_ = 0;
};

}  // namespace moebius::runtime::sim
