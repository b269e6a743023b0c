#pragma once

// One process of ours: actors, their mailbox, timers, compute and sessions, driven by one loop.
//
//   Node node(options, transport, clock, pool);
//   node.AddActor(kRouter, std::make_unique<RouterActor>(...));
//   node.Run();   // until Stop(), from any thread
//
// One turn of the loop polls the transport, takes finished compute, posted messages and timers,
// ticks the sessions, and delivers at most `deliveries_per_turn` messages. Idle, it polls for
// `spin` and then blocks in Transport::Wait. Frames between actors of the same node are handed over
// without copying or serialising.
//
// Threading: everything on the loop's thread, except Post, Stop and counters (any thread).
//
// Bounds, derived at construction: the mailbox holds the credits of every session, plus
// `local_messages` for frames between own actors, timers, compute and posted messages. Local sends
// and posts beyond their part are refused (kBusy; RESOURCE_EXHAUSTED), so remote frames have their
// place; a peer that overfills it all the same (by reconnecting in a flood) is disconnected.

#include <any>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "base/ids.h"
#include "base/prng.h"
#include "runtime/actor.h"
#include "runtime/clock.h"
#include "runtime/compute_pool.h"
#include "runtime/ring.h"
#include "runtime/session.h"
#include "runtime/timer_queue.h"
#include "runtime/transport.h"

namespace moebius::runtime {

struct NodeOptions {
  SessionIdentity identity;
  LinkTimings timings;
  uint64_t seed = 1;
  uint32_t credits_per_session = 16;  // data frames a peer may have outstanding towards us
  uint32_t local_messages = 4096;
  uint32_t deliveries_per_turn = 64;
  Duration spin = std::chrono::microseconds(30);
  int compute_threads = 1;
  // Simulation: when set, there are no threads; a work runs on the loop once this much virtual time
  // has passed since it could start.
  std::function<Duration()> simulated_compute_delay;
};

class Node {
 public:
  Node(NodeOptions options, Transport& transport, Clock& clock, BufferPool& pool);
  ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  // REQUIRES: called before the first turn; `id` not used yet.
  void AddActor(ActorId id, std::unique_ptr<Actor> actor);

  // Any thread. RESOURCE_EXHAUSTED when the posted part of the mailbox is full, NOT_FOUND without
  // that actor, UNAVAILABLE after Stop.
  absl::Status Post(ActorId to, std::any body);

  // One turn; true if it did anything. Starts the actors on the first call.
  bool RunOnce();
  // Turns until Stop().
  void Run();
  void Stop();

  // The latest time at which the next turn is due without outside events (simulation).
  TimePoint NextWake() const;

  NodeId id() const { return options_.identity.node; }
  Incarnation incarnation() const { return options_.identity.incarnation; }
  SessionCounters counters() const;
  uint64_t outstanding_frames() const { return sessions_.outstanding_frames(); }

 private:
  class ActorContext;
  struct Slot {
    ActorId id;
    std::unique_ptr<Actor> actor;
    std::unique_ptr<ActorContext> context;
    std::vector<NodeId> connected;  // peers this actor watches
    std::vector<NodeId> busy;       // peers it waits for to become writable
    uint32_t works = 0;             // submitted and not completed
    TimePoint compute_free_at;      // simulation: when its next work can start
  };
  struct Envelope {
    Slot* to = nullptr;
    Message message;
    uint64_t session = 0;  // whose credit returns after delivery; 0 = none
  };
  struct SimulatedWork {
    TimePoint ready_at;
    uint64_t sequence = 0;
    Slot* slot = nullptr;
    uint64_t tag = 0;
    std::function<absl::Status()> work;
  };

  Slot* FindSlot(ActorId id);
  void Start();
  bool Deliver();
  void Enqueue(Slot* to, Message message, uint64_t session = 0);
  void DispatchEvents(TimePoint now);
  void NotifyWritable(NodeId node);
  bool RunSimulatedWorks();
  // Room in the mailbox for what does not come from sessions.
  bool LocalFull() const { return mailbox_.size() >= local_limit_; }

  const NodeOptions options_;
  Transport& transport_;
  Clock& clock_;
  BufferPool& pool_;
  Prng prng_;
  SessionTable sessions_;
  std::vector<std::unique_ptr<Slot>> slots_;
  TimerQueue timers_;
  size_t local_limit_;
  size_t remote_limit_;
  Ring<Envelope> mailbox_;
  std::vector<TransportEvent> transport_events_;
  SessionEvents session_events_;
  std::vector<ComputeCompletion> completions_;
  std::vector<SimulatedWork> simulated_works_;
  uint64_t simulated_sequence_ = 0;
  std::vector<Slot*> buffer_waiters_;
  uint64_t buffer_releases_at_wait_ = 0;
  bool started_ = false;
  std::atomic<bool> stop_{false};

  struct PostedMessage {
    ActorId to;
    std::any body;
  };
  mutable std::mutex posted_mutex_;
  std::vector<PostedMessage> posted_;
  std::vector<PostedMessage> posted_taken_;
  mutable std::mutex counters_mutex_;
  SessionCounters published_counters_;

  std::unique_ptr<ComputePool> compute_;  // last: its threads stop before anything above dies
};

}  // namespace moebius::runtime
