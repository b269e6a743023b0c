// Goal: one node with real threads: posts and timers arrive, an actor's compute runs in order,
// local frames go through uncopied, unknown receivers are refused, and Stop ends the loop.

#include "runtime/node.h"

#include <atomic>
#include <future>
#include <thread>

#include "gtest/gtest.h"
#include "runtime/local_transport.h"

namespace moebius::runtime {
namespace {

class RealClock final : public Clock {
 public:
  TimePoint Now() const override {
    return {std::chrono::steady_clock::now().time_since_epoch().count()};
  }
};

struct Seen {
  std::vector<uint64_t> computed;
  std::promise<void> done;
  const std::byte* sent = nullptr;
  const std::byte* received = nullptr;
  bool timer = false;
};

class Worker final : public Actor {
 public:
  explicit Worker(Seen& seen) : seen_(seen) {}
  void Receive(Message message, Context& context) override {
    if (std::get_if<Posted>(&message) != nullptr) {
      for (uint64_t i = 1; i <= 20; ++i) {
        context.Submit(
            [this, i] {
              order_[i - 1] = ++running_;
              return absl::OkStatus();
            },
            i);
      }
    } else if (auto* computed = std::get_if<ComputeDone>(&message)) {
      seen_.computed.push_back(computed->tag);
      if (computed->tag < 20) return;
      for (uint64_t i = 0; i < 20; ++i) EXPECT_EQ(order_[i], i + 1);
      context.SetTimer(std::chrono::milliseconds(1), 7);
    } else if (auto* fired = std::get_if<TimerFired>(&message)) {
      EXPECT_EQ(fired->tag, 7u);
      seen_.timer = true;
      Frame frame;
      frame.payload = *context.AcquireBuffer(100);
      seen_.sent = frame.payload.data();
      EXPECT_EQ(context.Send({context.Self().node, ActorId(999)}, frame), SendResult::kUnreachable);
      EXPECT_EQ(context.Send({NodeId(77), kFirstTestActor}, frame), SendResult::kUnreachable);
      EXPECT_EQ(context.Send(context.Self(), frame), SendResult::kSent);
    } else if (auto* received = std::get_if<FrameReceived>(&message)) {
      seen_.received = received->frame.payload.data();
      seen_.done.set_value();
    }
  }

 private:
  Seen& seen_;
  uint64_t running_ = 0;
  uint64_t order_[20] = {};
};

TEST(Node, RunsPostsComputeTimersAndLocalFrames) {
  RealClock clock;
  BufferPool pool({{128, 8}});
  LocalTransport transport;
  NodeOptions options;
  options.identity.node = NodeId(1);
  options.identity.incarnation = Incarnation(1);
  options.compute_threads = 3;
  Seen seen;
  Node node(options, transport, clock, pool);
  node.AddActor(kFirstTestActor, std::make_unique<Worker>(seen));
  std::thread loop([&] { node.Run(); });
  EXPECT_EQ(node.Post(ActorId(5), 0).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(node.Post(kFirstTestActor, 0).ok());
  seen.done.get_future().wait();
  node.Stop();
  loop.join();
  EXPECT_EQ(node.Post(kFirstTestActor, 0).code(), absl::StatusCode::kUnavailable);
  ASSERT_EQ(seen.computed.size(), 20u);
  for (uint64_t i = 0; i < 20; ++i) EXPECT_EQ(seen.computed[i], i + 1);
  EXPECT_TRUE(seen.timer);
  EXPECT_EQ(seen.sent, seen.received) << "handed over, not copied";
}

TEST(Node, PostsBeyondTheBoundAreRefused) {
  RealClock clock;
  BufferPool pool({{128, 8}});
  LocalTransport transport;
  NodeOptions options;
  options.identity.node = NodeId(1);
  options.identity.incarnation = Incarnation(1);
  options.local_messages = 16;
  Seen seen;
  Node node(options, transport, clock, pool);
  node.AddActor(kFirstTestActor, std::make_unique<Worker>(seen));
  int accepted = 0;
  while (accepted < 1000 && node.Post(kFirstTestActor, 0).ok()) ++accepted;
  EXPECT_EQ(accepted, 8);
}

}  // namespace
}  // namespace moebius::runtime
