// Goal: one node's loop keeps the promises of context.h to its actors: frames by reference, bounded
// mailbox with back-pressure, timers, compute in order, posts from any thread.

#include "runtime/node.h"

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/local_transport.h"

namespace moebius::runtime {
namespace {

constexpr ActorId kFirst = kFirstTestActor;
constexpr ActorId kSecond{65};

class ManualClock final : public Clock {
 public:
  TimePoint Now() const override { return now; }
  TimePoint now{1'000'000'000};
};

class SteadyClock final : public Clock {
 public:
  TimePoint Now() const override {
    return TimePoint{std::chrono::steady_clock::now().time_since_epoch().count()};
  }
};

// An actor made of two functions.
class Scripted final : public Actor {
 public:
  using OnStart = std::function<void(Context&)>;
  using OnMessage = std::function<void(Message&, Context&)>;
  Scripted(OnStart start, OnMessage message)
      : start_(std::move(start)), message_(std::move(message)) {}
  void Start(Context& context) override {
    if (start_) start_(context);
  }
  void Receive(Message message, Context& context) override {
    if (message_) message_(message, context);
  }

 private:
  OnStart start_;
  OnMessage message_;
};

NodeOptions Options() {
  NodeOptions options;
  options.identity.node = NodeId(1);
  options.identity.incarnation = Incarnation(1);
  options.local_messages = 32;
  return options;
}

Frame NumberedFrame(uint64_t number) {
  Frame frame;
  frame.header.type = static_cast<uint16_t>(wire::FrameType::kTest);
  frame.header.correlation = number;
  return frame;
}

struct Fixture {
  explicit Fixture(NodeOptions options = Options())
      : pool({{256, 4}}), node(std::move(options), transport, clock, pool) {}
  void Add(ActorId id, Scripted::OnStart start, Scripted::OnMessage message) {
    node.AddActor(id, std::make_unique<Scripted>(std::move(start), std::move(message)));
  }
  // Turns until nothing is left to do at this point of time.
  void Settle() {
    while (node.RunOnce()) {
    }
  }
  ManualClock clock;
  LocalTransport transport;
  BufferPool pool;
  Node node;
};

TEST(Node, FramesBetweenItsActorsAreHandedOverNotCopied) {
  Fixture f;
  const std::byte* sent = nullptr;
  const std::byte* received = nullptr;
  ActorAddress from;
  f.Add(
      kFirst,
      [&](Context& context) {
        Frame frame = NumberedFrame(5);
        frame.payload = *context.AcquireBuffer(100);
        sent = frame.payload.data();
        EXPECT_EQ(context.Send({NodeId(1), kSecond}, frame), SendResult::kSent);
        EXPECT_EQ(frame.payload.data(), nullptr) << "consumed";
        EXPECT_EQ(context.Send({NodeId(1), ActorId(99)}, frame), SendResult::kUnreachable);
        EXPECT_EQ(context.Send({NodeId(2), kSecond}, frame), SendResult::kUnreachable);
      },
      nullptr);
  f.Add(kSecond, nullptr, [&](Message& message, Context&) {
    auto& frame = std::get<FrameReceived>(message);
    received = frame.frame.payload.data();
    from = frame.from;
    EXPECT_EQ(frame.frame.header.payload_bytes, 100u);
    EXPECT_EQ(frame.from_incarnation, Incarnation(1));
  });
  f.Settle();
  EXPECT_NE(sent, nullptr);
  EXPECT_EQ(sent, received);
  EXPECT_EQ(from, (ActorAddress{NodeId(1), kFirst}));
  EXPECT_EQ(f.pool.in_use(), 0u);
}

TEST(Node, AFullMailboxPushesBackAndLosesNothing) {
  Fixture f;
  constexpr uint64_t kTotal = 500;
  uint64_t next = 1;
  int refusals = 0;
  std::vector<uint64_t> received;
  const auto pump = [&](Context& context) {
    while (next <= kTotal) {
      Frame frame = NumberedFrame(next);
      if (context.Send({NodeId(1), kSecond}, frame) == SendResult::kBusy) {
        EXPECT_EQ(frame.header.correlation, next) << "a refused frame is left as it was";
        ++refusals;
        return;
      }
      ++next;
    }
  };
  f.Add(kFirst, pump, [&](Message& message, Context& context) {
    EXPECT_EQ(std::get<Writable>(message).node, NodeId(1));
    pump(context);
  });
  f.Add(kSecond, nullptr, [&](Message& message, Context&) {
    received.push_back(std::get<FrameReceived>(message).frame.header.correlation);
  });
  f.Settle();
  EXPECT_GT(refusals, 10);
  ASSERT_EQ(received.size(), kTotal);
  for (uint64_t i = 0; i < kTotal; ++i) EXPECT_EQ(received[i], i + 1);
}

TEST(Node, AnExhaustedPoolIsAnswerableAndAnnouncedOncePerReturn) {
  Fixture f;
  std::vector<Buffer> held;
  int announced = 0;
  bool got_it = false;
  f.Add(
      kFirst,
      [&](Context& context) {
        while (std::optional<Buffer> buffer = context.AcquireBuffer(200)) {
          held.push_back(std::move(*buffer));
        }
      },
      [&](Message& message, Context& context) {
        EXPECT_EQ(std::get<Writable>(message).node, NodeId(1));
        ++announced;
        got_it = context.AcquireBuffer(200).has_value();
      });
  f.Settle();
  ASSERT_EQ(held.size(), 4u);
  EXPECT_EQ(announced, 0);
  // One comes back and another is taken before the node looks: still news for the one that waits.
  held.pop_back();
  held.push_back(*f.pool.Acquire(200));
  f.Settle();
  EXPECT_EQ(announced, 1);
  EXPECT_FALSE(got_it);
  held.pop_back();
  f.Settle();
  EXPECT_EQ(announced, 2);
  EXPECT_TRUE(got_it);
}

TEST(Node, TimersFireWhenDueInOrderAndNotOnceCancelled) {
  Fixture f;
  std::vector<std::pair<uint64_t, int64_t>> fired;  // (tag, ns after the start)
  const int64_t start = f.clock.now.ns;
  f.Add(
      kFirst,
      [&](Context& context) {
        context.SetTimer(Duration(300), 3);
        context.SetTimer(Duration(100), 1);
        context.CancelTimer(context.SetTimer(Duration(200), 2));
        context.CancelTimer(0);
      },
      [&](Message& message, Context& context) {
        fired.emplace_back(std::get<TimerFired>(message).tag, context.Now().ns - start);
      });
  f.Settle();
  EXPECT_TRUE(fired.empty());
  for (int64_t ns : {99, 100, 200, 300, 400}) {
    f.clock.now.ns = start + ns;
    f.Settle();
  }
  EXPECT_EQ(fired, (std::vector<std::pair<uint64_t, int64_t>>{{1, 100}, {3, 300}}));
  EXPECT_GE(f.node.NextWake(), f.clock.now);
}

TEST(Node, ComputeOfOneActorCompletesInOrderWithItsStatus) {
  Fixture f;
  std::vector<int> ran;  // by the compute thread; read after the last completion
  std::vector<std::pair<uint64_t, bool>> done;
  f.Add(
      kFirst,
      [&](Context& context) {
        for (int i = 0; i < 20; ++i) {
          context.Submit(
              [&ran, i] {
                ran.push_back(i);
                return i == 3 ? absl::InternalError("three") : absl::OkStatus();
              },
              static_cast<uint64_t>(i));
        }
      },
      [&](Message& message, Context&) {
        const auto& completion = std::get<ComputeDone>(message);
        done.emplace_back(completion.tag, completion.status.ok());
      });
  while (done.size() < 20) {
    if (!f.node.RunOnce()) f.transport.Wait(std::chrono::seconds(10));  // a completion wakes it
  }
  for (uint64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(ran[i], static_cast<int>(i));
    EXPECT_EQ(done[i], (std::pair<uint64_t, bool>(i, i != 3)));
  }
}

TEST(Node, PostsAreBoundedAndNameTheirError) {
  Fixture f;
  std::vector<int> received;
  f.Add(kFirst, nullptr, [&](Message& message, Context&) {
    received.push_back(*std::any_cast<int>(&std::get<Posted>(message).body));
  });
  EXPECT_EQ(f.node.Post(kSecond, 1).code(), absl::StatusCode::kNotFound);
  int accepted = 0;
  absl::Status status;
  for (; accepted < 1000; ++accepted) {
    status = f.node.Post(kFirst, accepted);
    if (!status.ok()) break;
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(accepted, 16);  // half of local_messages
  f.Settle();
  ASSERT_EQ(received.size(), 16u);
  for (int i = 0; i < 16; ++i) EXPECT_EQ(received[static_cast<size_t>(i)], i);
  EXPECT_TRUE(f.node.Post(kFirst, 0).ok());
  f.node.Stop();
  EXPECT_EQ(f.node.Post(kFirst, 0).code(), absl::StatusCode::kUnavailable);
}

TEST(Node, ARunningLoopTakesPostsOfManyThreadsAndStops) {
  SteadyClock clock;
  LocalTransport transport;
  BufferPool pool({{256, 4}});
  NodeOptions options = Options();
  options.local_messages = 4096;
  Node node(options, transport, clock, pool);
  constexpr int kThreads = 3;
  constexpr int kEach = 500;
  std::vector<int> next(kThreads, 0);  // the loop's thread alone writes it
  std::atomic<int> total{0};
  std::atomic<bool> in_order{true};
  node.AddActor(kFirst, std::make_unique<Scripted>(nullptr, [&](Message& message, Context&) {
                  const auto [thread, number] =
                      *std::any_cast<std::pair<int, int>>(&std::get<Posted>(message).body);
                  if (next[static_cast<size_t>(thread)]++ != number) in_order = false;
                  total.fetch_add(1);
                  total.notify_all();
                }));
  std::thread loop([&] { node.Run(); });
  std::vector<std::thread> posters;
  for (int t = 0; t < kThreads; ++t) {
    posters.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i)
        EXPECT_TRUE(node.Post(kFirst, std::pair<int, int>(t, i)).ok());
    });
  }
  for (std::thread& poster : posters) poster.join();
  for (int seen = total.load(); seen < kThreads * kEach; seen = total.load()) total.wait(seen);
  node.Stop();
  loop.join();
  EXPECT_TRUE(in_order.load());
}

}  // namespace
}  // namespace moebius::runtime
