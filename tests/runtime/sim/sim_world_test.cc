// Goal: the simulated cluster is deterministic, delivers in order, and fails the way its header
// says.

#include "runtime/sim/sim_world.h"

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::runtime::sim {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr NodeId kServer{1};
constexpr NodeId kClient{2};
constexpr ActorId kActor = kFirstTestActor;

// Answers each test frame with the same correlation, in order; keeps answers that cannot leave yet.
class Echo final : public Actor {
 public:
  void Receive(Message message, Context& context) override {
    if (auto* received = std::get_if<FrameReceived>(&message)) {
      Frame answer;
      answer.header.type = static_cast<uint16_t>(wire::FrameType::kTest);
      answer.header.correlation = received->frame.header.correlation;
      answer.payload = std::move(received->frame.payload);
      waiting_.emplace_back(received->from, std::move(answer));
    }
    while (!waiting_.empty()) {
      const SendResult result = context.Send(waiting_.front().first, waiting_.front().second);
      if (result == SendResult::kBusy) return;
      waiting_.pop_front();  // sent, or nobody to send it to any more
    }
  }

 private:
  std::deque<std::pair<ActorAddress, Frame>> waiting_;
};

struct ClientLog {
  std::vector<uint64_t> answers;
  std::vector<LinkChanged> links;
  uint64_t next_to_send = 1;
};

// Sends frames 1..count as fast as the session takes them.
class Asker final : public Actor {
 public:
  Asker(ClientLog& log, uint64_t count) : log_(log), count_(count) {}
  void Start(Context& context) override {
    context.Connect(PeerInfo{kServer, Incarnation(), SimWorld::AddressOf(kServer)});
  }
  void Receive(Message message, Context& context) override {
    if (auto* link = std::get_if<LinkChanged>(&message)) {
      log_.links.push_back(*link);
      if (link->state == LinkState::kUp) Pump(context);
    } else if (auto* received = std::get_if<FrameReceived>(&message)) {
      log_.answers.push_back(received->frame.header.correlation);
      Pump(context);
    } else if (std::get_if<Writable>(&message) != nullptr) {
      Pump(context);
    }
  }

 private:
  void Pump(Context& context) {
    while (log_.next_to_send <= count_) {
      std::optional<Buffer> buffer = context.AcquireBuffer(100);
      if (!buffer) return;
      std::memset(buffer->data(), static_cast<int>(log_.next_to_send), 100);
      Frame frame;
      frame.header.type = static_cast<uint16_t>(wire::FrameType::kTest);
      frame.header.correlation = log_.next_to_send;
      frame.payload = std::move(*buffer);
      if (context.Send(ActorAddress{kServer, kActor}, frame) != SendResult::kSent) return;
      ++log_.next_to_send;
    }
  }
  ClientLog& log_;
  uint64_t count_;
};

std::vector<BufferClass> Buffers() { return {{256, 64}, {4096, 16}}; }

void Build(SimWorld& world, ClientLog& log, uint64_t count, NodeOptions options = {}) {
  world.AddNode(kServer, options, Buffers(),
                [](Node& node) { node.AddActor(kActor, std::make_unique<Echo>()); });
  world.AddNode(kClient, options, Buffers(), [&log, count](Node& node) {
    node.AddActor(kActor, std::make_unique<Asker>(log, count));
  });
}

TEST(SimWorld, AnswersComeInOrderAndCreditsBalance) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    SimWorld world(seed);
    ClientLog log;
    Build(world, log, 200);
    ASSERT_TRUE(world.RunUntil([&] { return log.answers.size() == 200; }, seconds(10)))
        << "seed " << seed;
    for (uint64_t i = 0; i < 200; ++i) ASSERT_EQ(log.answers[i], i + 1) << "seed " << seed;
    world.RunFor(seconds(1));
    EXPECT_EQ(world.pool(kServer).in_use(), 0u);
    EXPECT_EQ(world.pool(kClient).in_use(), 0u);
    EXPECT_LT(world.node(kClient).outstanding_frames(), 16u);
  }
}

TEST(SimWorld, TheSameSeedIsTheSameRun) {
  const auto run = [](uint64_t seed) {
    SimWorld world(seed);
    ClientLog log;
    Build(world, log, 100);
    world.RunFor(seconds(1));
    return std::make_pair(world.trace_hash(), world.frames_delivered());
  };
  EXPECT_EQ(run(7), run(7));
  EXPECT_NE(run(7).first, run(8).first);
}

TEST(SimWorld, ACrashedPeerIsDownAndItsNextIncarnationIsUp) {
  for (double silent : {0.0, 1.0}) {
    SimOptions options;
    options.silent_crash_probability = silent;
    SimWorld world(3, options);
    ClientLog log;
    Build(world, log, 10);
    ASSERT_TRUE(world.RunUntil([&] { return log.answers.size() == 10; }, seconds(10)));
    world.Crash(kServer);
    ASSERT_TRUE(
        world.RunUntil([&] { return log.links.back().state == LinkState::kDown; }, seconds(5)));
    EXPECT_EQ(log.links.back().incarnation, Incarnation(1));
    if (silent == 1.0) {
      // Without a closed connection our own heartbeats notice, step by step.
      ASSERT_GE(log.links.size(), 4u);
      EXPECT_EQ(log.links[1].state, LinkState::kSlow);
      EXPECT_EQ(log.links[2].state, LinkState::kSuspect);
    }
    world.Restart(kServer);
    ASSERT_TRUE(
        world.RunUntil([&] { return log.links.back().state == LinkState::kUp; }, seconds(10)));
    EXPECT_EQ(log.links.back().incarnation, Incarnation(2));
  }
}

TEST(SimWorld, AOneWayPartitionIsNoticedFromEitherSideAndHeals) {
  for (bool towards_server : {true, false}) {
    SimWorld world(5);
    ClientLog log;
    Build(world, log, 10);
    ASSERT_TRUE(world.RunUntil([&] { return log.answers.size() == 10; }, seconds(10)));
    const NodeId from = towards_server ? kClient : kServer;
    const NodeId to = towards_server ? kServer : kClient;
    world.Partition(from, to);
    ASSERT_TRUE(
        world.RunUntil([&] { return log.links.back().state == LinkState::kDown; }, seconds(5)));
    world.Heal(from, to);
    ASSERT_TRUE(
        world.RunUntil([&] { return log.links.back().state == LinkState::kUp; }, seconds(10)));
  }
}

TEST(SimWorld, APeerOfAnotherModelIsRefusedWithTheReason) {
  SimWorld world(1);
  ClientLog log;
  NodeOptions other;
  other.identity.model_digest = {1, 2};
  world.AddNode(kServer, other, Buffers(),
                [](Node& node) { node.AddActor(kActor, std::make_unique<Echo>()); });
  world.AddNode(kClient, {}, Buffers(),
                [&log](Node& node) { node.AddActor(kActor, std::make_unique<Asker>(log, 1)); });
  ASSERT_TRUE(world.RunUntil([&] { return !log.links.empty(); }, seconds(5)));
  EXPECT_EQ(log.links[0].state, LinkState::kDown);
  EXPECT_NE(log.links[0].reason.find("model digest"), std::string::npos) << log.links[0].reason;
  EXPECT_TRUE(log.answers.empty());
}

TEST(SimWorld, ADamagedFrameNeverReachesAnActor) {
  SimOptions options;
  options.corrupt_probability = 0.05;
  SimWorld world(11, options);
  ClientLog log;
  Build(world, log, 2000);
  world.RunFor(seconds(20));
  EXPECT_GT(world.node(kServer).counters().checksum_failures +
                world.node(kClient).counters().checksum_failures,
            5u);
  for (size_t i = 1; i < log.answers.size(); ++i) ASSERT_GT(log.answers[i], log.answers[i - 1]);
}

}  // namespace
}  // namespace moebius::runtime::sim
