#pragma once

// One actor under test with everything around it faked on a virtual clock: timers, compute work, a
// buffer pool, and a "network" that the test supplies as a function. Single-threaded; the same seed
// gives the same run. For tests of one actor; clusters use runtime/sim.

#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/prng.h"
#include "runtime/actor.h"
#include "runtime/buffer_pool.h"

namespace moebius::attention_worker {

class FakeNode final : public runtime::Context {
 public:
  using SendHook =
      std::function<runtime::SendResult(const runtime::ActorAddress&, runtime::Frame&)>;

  FakeNode(uint64_t seed, runtime::Duration max_compute)
      : pool_({{256, 64}, {128 * 1024, 16}}), prng_(seed), max_compute_(max_compute) {}

  void Host(runtime::Actor* actor) {
    actor_ = actor;
    actor_->Start(*this);
  }
  void OnSend(SendHook hook) { send_ = std::move(hook); }

  void Post(std::any body) { Deliver(runtime::Posted{std::move(body)}, {}); }
  // Delivers `message` to the actor after `delay`.
  void Deliver(runtime::Message message, runtime::Duration delay) {
    events_.emplace(Key{now_ + delay, ++order_}, Event{std::move(message), nullptr, 0});
  }

  // Runs one event; false when there is none.
  bool Step() {
    if (events_.empty()) return false;
    auto node = events_.extract(events_.begin());
    now_ = node.key().first;
    Event& event = node.mapped();
    if (event.work) {
      runtime::ComputeDone done;
      done.tag = event.tag;
      if (on_enter_) on_enter_(true);
      done.status = event.work();
      if (on_enter_) on_enter_(false);
      event.message = std::move(done);
    } else if (auto* timer = std::get_if<runtime::TimerFired>(&event.message)) {
      if (cancelled_.count(timer->timer) != 0) return true;
    }
    if (on_enter_) on_enter_(true);
    actor_->Receive(std::move(event.message), *this);
    if (on_enter_) on_enter_(false);
    return true;
  }
  void RunUntilIdle() {
    for (int i = 0; Step(); ++i) CHECK_LT(i, 10'000'000);
  }
  // Called with true before and false after the actor's own code runs (and around Context calls the
  // other way): lets a test count what that code allocates.
  void OnEnter(std::function<void(bool)> hook) { on_enter_ = std::move(hook); }

  runtime::BufferPool& pool() { return pool_; }
  Prng& prng() { return prng_; }

  // Context.
  runtime::ActorAddress Self() const override { return {NodeId(1), runtime::kAttentionWorker}; }
  Incarnation SelfIncarnation() const override { return Incarnation(1); }
  runtime::TimePoint Now() const override { return now_; }
  uint64_t Random() override { return prng_.Next(); }
  runtime::SendResult Send(const runtime::ActorAddress& to, runtime::Frame& frame) override {
    Outside outside(this);
    return send_(to, frame);
  }
  std::optional<runtime::Buffer> AcquireBuffer(size_t bytes) override {
    Outside outside(this);
    return pool_.Acquire(bytes);
  }
  uint64_t SetTimer(runtime::Duration delay, uint64_t tag) override {
    Outside outside(this);
    Deliver(runtime::TimerFired{++timers_, tag}, delay);
    return timers_;
  }
  void CancelTimer(uint64_t timer) override {
    Outside outside(this);
    cancelled_[timer] = true;
  }
  void Submit(std::function<absl::Status()> work, uint64_t tag) override {
    Outside outside(this);
    const runtime::Duration delay(static_cast<int64_t>(prng_.Below(max_compute_.count() + 1)));
    // Works of one actor run one after another in order of submission.
    compute_until_ = std::max(compute_until_, now_) + delay;
    events_.emplace(Key{compute_until_, ++order_}, Event{{}, std::move(work), tag});
  }
  void Connect(const runtime::PeerInfo& peer) override { connected_.push_back(peer.node); }
  void Disconnect(NodeId node) override { disconnected_.push_back(node); }

  std::vector<NodeId> connected_, disconnected_;

 private:
  using Key = std::pair<runtime::TimePoint, uint64_t>;
  struct Event {
    runtime::Message message;
    std::function<absl::Status()> work;
    uint64_t tag;
  };
  struct Outside {
    explicit Outside(FakeNode* n) : node(n) {
      if (node->on_enter_) node->on_enter_(false);
    }
    ~Outside() {
      if (node->on_enter_) node->on_enter_(true);
    }
    FakeNode* node;
  };

  runtime::BufferPool pool_;
  Prng prng_;
  runtime::Duration max_compute_;
  runtime::Actor* actor_ = nullptr;
  SendHook send_;
  std::function<void(bool)> on_enter_;
  std::map<Key, Event> events_;
  std::map<uint64_t, bool> cancelled_;
  runtime::TimePoint now_;
  runtime::TimePoint compute_until_;
  uint64_t order_ = 0;
  uint64_t timers_ = 0;
};

}  // namespace moebius::attention_worker
