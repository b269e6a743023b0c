#pragma once

// A runtime::Context that a test plays by hand: what the actor sent, submitted and asked for is
// kept, and nothing happens until the test says so. Time stands still unless `now` is changed.

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "base/prng.h"
#include "runtime/actor.h"

namespace moebius::runtime {

class FakeContext final : public Context {
 public:
  struct Sent {
    ActorAddress to;
    Frame frame;
  };

  FakeContext(ActorAddress self, BufferPool& pool) : self_(self), pool_(pool) {}

  ActorAddress Self() const override { return self_; }
  Incarnation SelfIncarnation() const override { return Incarnation(1); }
  TimePoint Now() const override { return now; }
  uint64_t Random() override { return prng_.Next(); }
  SendResult Send(const ActorAddress& to, Frame& frame) override {
    if (const auto scripted = answers.find(to.node); scripted != answers.end()) {
      if (scripted->second != SendResult::kSent) return scripted->second;
    }
    sent.push_back(Sent{to, std::move(frame)});
    return SendResult::kSent;
  }
  std::optional<Buffer> AcquireBuffer(size_t bytes) override { return pool_.Acquire(bytes); }
  uint64_t SetTimer(Duration delay, uint64_t tag) override {
    timers_.emplace_back(now + delay, tag);
    return timers_.size();
  }
  void CancelTimer(uint64_t timer) override { (void)timer; }
  void Submit(std::function<absl::Status()> work, uint64_t tag) override {
    works_.emplace_back(std::move(work), tag);
  }
  void Connect(const PeerInfo& peer) override { connected[peer.node] = peer.incarnation; }
  void Disconnect(NodeId node) override { connected.erase(node); }

  // Runs what was submitted, in order, and what that submits.
  void RunWorks(Actor& actor) {
    while (!works_.empty()) {
      auto [work, tag] = std::move(works_.front());
      works_.pop_front();
      actor.Receive(ComputeDone{tag, work()}, *this);
    }
  }
  // Lets `by` pass and fires the timers that are due, one after another.
  void Pass(Actor& actor, Duration by) {
    const TimePoint until = now + by;
    for (;;) {
      const auto due = std::min_element(timers_.begin(), timers_.end());
      if (due == timers_.end() || due->first > until) break;
      const uint64_t tag = due->second;
      now = due->first;
      timers_.erase(due);
      actor.Receive(TimerFired{0, tag}, *this);
    }
    now = until;
  }
  size_t works() const { return works_.size(); }

  TimePoint now{1'000'000};
  std::vector<Sent> sent;
  std::map<NodeId, SendResult> answers;  // of Send to a node; absent = kSent
  std::map<NodeId, Incarnation> connected;

 private:
  const ActorAddress self_;
  BufferPool& pool_;
  Prng prng_{7};
  std::vector<std::pair<TimePoint, uint64_t>> timers_;
  std::deque<std::pair<std::function<absl::Status()>, uint64_t>> works_;
};

}  // namespace moebius::runtime
