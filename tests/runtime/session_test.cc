// Goal: a session admits only who it should, survives any peer, and tells the truth about a link. A
// hand-made peer speaks raw frames to a node over the simulated network.

#include "runtime/session.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/sim/sim_world.h"
#include "tests/runtime/raw_peer.h"

namespace moebius::runtime {
namespace {

using sim::SimOptions;
using sim::SimTransport;
using sim::SimWorld;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;
using wire::FrameType;

using session_test::kActor;
using session_test::kNode;
using session_test::kPeer;
using session_test::RawPeer;

std::vector<BufferClass> Buffers() { return {{256, 128}, {4096, 16}}; }

NodeOptions Options() { return session_test::Agreed(); }

// Everything sent in one instant arrives in one turn.
SimOptions FixedDelay() {
  SimOptions options;
  options.delay_min = options.delay_max = microseconds(10);
  return options;
}

struct ActorLog {
  std::vector<uint64_t> frames;  // correlations
  std::vector<LinkChanged> links;
  std::vector<NodeId> writable;
};

// Records what it gets. Asked for `reply_count` answers it sends them as the session takes them.
class Recorder final : public Actor {
 public:
  Recorder(ActorLog& log, uint64_t reply_count, std::optional<PeerInfo> connect_to)
      : log_(log), reply_count_(reply_count), connect_to_(std::move(connect_to)) {}
  void Start(Context& context) override {
    if (connect_to_) context.Connect(*connect_to_);
  }
  void Receive(Message message, Context& context) override {
    if (const auto* received = std::get_if<FrameReceived>(&message)) {
      log_.frames.push_back(received->frame.header.correlation);
      to_ = received->from;
      left_ = reply_count_;
    } else if (const auto* link = std::get_if<LinkChanged>(&message)) {
      log_.links.push_back(*link);
    } else if (const auto* writable = std::get_if<Writable>(&message)) {
      log_.writable.push_back(writable->node);
    }
    while (left_ > 0) {
      Frame frame;
      frame.header.type = static_cast<uint16_t>(FrameType::kTest);
      if (context.Send(to_, frame) != SendResult::kSent) return;
      --left_;
    }
  }

 private:
  ActorLog& log_;
  const uint64_t reply_count_;
  const std::optional<PeerInfo> connect_to_;
  ActorAddress to_;
  uint64_t left_ = 0;
};

class Session : public testing::Test {
 protected:
  void AddNode(uint64_t reply_count = 0, std::optional<PeerInfo> connect_to = std::nullopt) {
    world_.AddNode(kNode, Options(), Buffers(), [this, reply_count, connect_to](Node& node) {
      node.AddActor(kActor, std::make_unique<Recorder>(log_, reply_count, connect_to));
    });
    world_.AddBareTransport(kPeer, Buffers());
  }
  SessionCounters Counters() { return world_.node(kNode).counters(); }

  SimWorld world_{1, FixedDelay()};
  ActorLog log_;
};

TEST_F(Session, AGoodPeersFramesReachTheActor) {
  AddNode();
  RawPeer peer(world_, kPeer);
  peer.Join();
  ASSERT_EQ(peer.Received(FrameType::kHelloReply), 1u);
  wire::HelloRecord reply;
  ASSERT_TRUE(wire::ParseHello(peer.inbox[0].payload.bytes(), &reply).ok());
  EXPECT_EQ(reply.node, kNode.value());
  EXPECT_EQ(reply.credits, 16u);
  peer.Send(peer.Header(FrameType::kTest, 41));
  peer.Send(peer.Header(FrameType::kTest, 42));
  peer.Wait();
  peer.Send(peer.Header(FrameType::kHeartbeat, 7));
  peer.Wait();
  EXPECT_FALSE(peer.closed);
  EXPECT_EQ(log_.frames, (std::vector<uint64_t>{41, 42}));
  ASSERT_EQ(peer.Received(FrameType::kHeartbeatReply), 1u);
  EXPECT_EQ(peer.inbox.back().header.correlation, 7u);
  EXPECT_EQ(peer.inbox.back().header.acknowledged, 2u);
}

TEST_F(Session, AHelloThatDiffersIsAnsweredButNeverComesUp) {
  AddNode();
  struct Case {
    const char* name;
    std::function<void(wire::HelloRecord&)> change;
  };
  const Case cases[] = {
      {"model digest, low half", [](auto& hello) { hello.model_digest_low ^= 1; }},
      {"model digest, high half", [](auto& hello) { hello.model_digest_high ^= 1; }},
      {"numerics class", [](auto& hello) { hello.numerics_class ^= 1; }},
      {"expected node", [](auto& hello) { hello.expected_node = 99; }},
      {"expected incarnation", [](auto& hello) { hello.expected_incarnation = 99; }},
      {"no node", [](auto& hello) { hello.node = 0; }},
      {"no incarnation", [](auto& hello) { hello.incarnation = 0; }},
      {"no credits", [](auto& hello) { hello.credits = 0; }},
  };
  uint64_t refused = 0;
  for (const Case& test : cases) {
    SCOPED_TRACE(test.name);
    RawPeer peer(world_, kPeer);
    peer.Dial();
    wire::HelloRecord hello = peer.GoodHello();
    test.change(hello);
    peer.SayHello(hello);
    peer.Wait();
    EXPECT_EQ(peer.Received(FrameType::kHelloReply), 1u) << "so that the peer knows why";
    EXPECT_EQ(Counters().refused_handshakes, ++refused);
    peer.Send(peer.Header(FrameType::kTest, 1));
    peer.Wait(milliseconds(50));
    EXPECT_TRUE(peer.closed);
  }
  EXPECT_EQ(Counters().sessions_opened, 0u);
  EXPECT_TRUE(log_.frames.empty());
}

TEST_F(Session, AnotherProtocolVersionIsToldOurs) {
  AddNode();
  RawPeer peer(world_, kPeer);
  peer.Dial();
  wire::FrameHeader header = peer.Header(FrameType::kHello, 0);
  header.version = wire::kProtocolVersion + 1;
  peer.Send(header);
  peer.Wait();
  ASSERT_EQ(peer.Received(FrameType::kHelloReply), 1u);
  EXPECT_EQ(peer.inbox[0].header.version, wire::kProtocolVersion);
  EXPECT_EQ(Counters().refused_handshakes, 1u);
  EXPECT_EQ(Counters().checksum_failures, 0u);
  peer.Wait(seconds(3));
  EXPECT_TRUE(peer.closed);
}

TEST_F(Session, ABadFrameClosesItsConnectionAndReachesNoActor) {
  AddNode();
  struct Case {
    const char* name;
    bool fenced;
    bool damaged;
    std::function<void(RawPeer&)> say;
  };
  const Case cases[] = {
      {"gap in the sequence", false, false,
       [](RawPeer& peer) {
         peer.Header(FrameType::kTest, 0);  // a number that is never sent
         peer.Send(peer.Header(FrameType::kTest, 1));
       }},
      {"sequence repeated", false, false,
       [](RawPeer& peer) {
         wire::FrameHeader header = peer.Header(FrameType::kTest, 1);
         --header.sequence;
         peer.Send(header);
       }},
      {"to an older incarnation of ours", true, false,
       [](RawPeer& peer) {
         wire::FrameHeader header = peer.Header(FrameType::kTest, 1);
         header.destination_incarnation = 2;
         peer.Send(header);
       }},
      {"from an older incarnation of the peer's", true, false,
       [](RawPeer& peer) {
         wire::FrameHeader header = peer.Header(FrameType::kTest, 1);
         --header.source_incarnation;
         peer.Send(header);
       }},
      {"of another model", true, false,
       [](RawPeer& peer) {
         wire::FrameHeader header = peer.Header(FrameType::kTest, 1);
         header.model_digest ^= 1;
         peer.Send(header);
       }},
      {"acknowledges what was not sent", false, false,
       [](RawPeer& peer) {
         wire::FrameHeader header = peer.Header(FrameType::kTest, 1);
         header.acknowledged = 1;
         peer.Send(header);
       }},
      {"a second hello", false, false, [](RawPeer& peer) { peer.SayHello(peer.GoodHello()); }},
      {"a hello reply to the side that answers", false, false,
       [](RawPeer& peer) { peer.SayHello(peer.GoodHello(), FrameType::kHelloReply); }},
      {"heartbeat without a number", false, false,
       [](RawPeer& peer) { peer.Send(peer.Header(FrameType::kHeartbeat, 0)); }},
      {"heartbeat with a payload", false, false,
       [](RawPeer& peer) {
         const std::byte bytes[16] = {};
         peer.Send(peer.Header(FrameType::kHeartbeat, 1), bytes);
       }},
      {"a flipped bit", false, true,
       [](RawPeer& peer) {
         wire::FrameHeader header = peer.Header(FrameType::kTest, 1);
         wire::SealFrame(header, {});
         header.correlation ^= 1;
         peer.Send(header, {}, /*seal=*/false);
       }},
      {"no magic", false, true,
       [](RawPeer& peer) {
         wire::FrameHeader header = peer.Header(FrameType::kTest, 1);
         header.magic = 0;
         peer.Send(header);
       }},
      {"a length that is not the payload's", false, true,
       [](RawPeer& peer) {
         wire::FrameHeader header = peer.Header(FrameType::kTest, 1);
         wire::SealFrame(header, {});
         header.payload_bytes = uint64_t{1} << 60;
         peer.Send(header, {}, /*seal=*/false);
       }},
      {"more frames than credits", false, false,
       [](RawPeer& peer) {
         for (uint64_t i = 1; i <= 17; ++i) {
           wire::FrameHeader header = peer.Header(FrameType::kTest, 100 + i);
           header.destination_actor = 9999;  // nobody: the session counts all the same
           peer.Send(header);
         }
       }},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.name);
    RawPeer peer(world_, kPeer);
    peer.Join();
    ASSERT_FALSE(peer.closed);
    const SessionCounters before = Counters();
    test.say(peer);
    peer.Wait(milliseconds(50));
    EXPECT_TRUE(peer.closed);
    const SessionCounters after = Counters();
    EXPECT_EQ(after.fenced_frames - before.fenced_frames, test.fenced ? 1u : 0u);
    EXPECT_EQ(after.checksum_failures - before.checksum_failures, test.damaged ? 1u : 0u);
    EXPECT_EQ(after.sessions_closed - before.sessions_closed, 1u);
  }
  EXPECT_TRUE(log_.frames.empty());
  EXPECT_EQ(world_.pool(kNode).in_use(), 0u);
}

TEST_F(Session, DataBeforeTheHandshakeIsRefused) {
  AddNode();
  RawPeer peer(world_, kPeer);
  peer.Dial();
  peer.Send(peer.Header(FrameType::kTest, 1));
  peer.Wait(milliseconds(50));
  EXPECT_TRUE(peer.closed);
  EXPECT_TRUE(log_.frames.empty());
}

TEST_F(Session, WhoeverConnectsAndSaysNothingIsCutOff) {
  AddNode();
  RawPeer peer(world_, kPeer);
  peer.Dial();
  peer.Wait(seconds(3));
  EXPECT_TRUE(peer.closed);
}

TEST_F(Session, ANewerIncarnationReplacesAnOlderAndAZombieIsRefused) {
  AddNode();
  world_.AddBareTransport(NodeId(3), Buffers());  // the zombie's connection comes from elsewhere
  RawPeer old_one(world_, kPeer);
  old_one.Join();
  RawPeer new_one(world_, kPeer);
  new_one.incarnation = 6;
  new_one.Join();
  EXPECT_EQ(new_one.Received(FrameType::kHelloReply), 1u);
  old_one.Wait(milliseconds(50));
  old_one.Send(old_one.Header(FrameType::kTest, 1));
  old_one.Wait(milliseconds(50));
  EXPECT_TRUE(log_.frames.empty()) << "a frame of the old incarnation is void";

  RawPeer zombie(world_, kPeer);
  zombie.Join();  // incarnation 5 again
  zombie.Wait(milliseconds(50));
  EXPECT_EQ(zombie.Received(FrameType::kHelloReply), 0u);
  EXPECT_TRUE(zombie.closed);
  EXPECT_EQ(Counters().fenced_frames, 1u);
  new_one.Send(new_one.Header(FrameType::kTest, 2));
  new_one.Wait();
  EXPECT_EQ(log_.frames, std::vector<uint64_t>{2});
}

TEST_F(Session, WeNeverSendMoreThanThePeerGrantedAndGoOnWhenItAcknowledges) {
  AddNode(/*reply_count=*/10);
  RawPeer peer(world_, kPeer);
  peer.Join();
  peer.Send(peer.Header(FrameType::kTest, 1));
  peer.Wait(milliseconds(50));
  EXPECT_EQ(peer.Received(FrameType::kTest), 4u);
  EXPECT_TRUE(log_.writable.empty());
  wire::FrameHeader acknowledge = peer.Header(FrameType::kAcknowledge, 0);
  acknowledge.acknowledged = 3;
  peer.Send(acknowledge);
  peer.Wait();
  EXPECT_EQ(peer.Received(FrameType::kTest), 7u);
  EXPECT_EQ(log_.writable, std::vector<NodeId>{kPeer});
  EXPECT_EQ(world_.node(kNode).outstanding_frames(), 4u);
}

TEST_F(Session, WhoWaitsForAnAcceptedSessionHearsOfItsEnd) {
  AddNode(/*reply_count=*/10);
  RawPeer peer(world_, kPeer);
  peer.Join();
  peer.Send(peer.Header(FrameType::kTest, 1));
  peer.Wait();
  ASSERT_TRUE(log_.writable.empty());
  peer.Close();
  peer.Wait(milliseconds(50));
  // The actor tries again, finds nobody, and is free to serve others.
  EXPECT_EQ(log_.writable, std::vector<NodeId>{kPeer});
  EXPECT_EQ(world_.node(kNode).outstanding_frames(), 0u) << "credits die with their session";
}

TEST_F(Session, HeartbeatsAreAnsweredThoughEveryBufferIsTaken) {
  AddNode();
  RawPeer peer(world_, kPeer);
  peer.Join();
  std::vector<Buffer> all;
  while (std::optional<Buffer> buffer = world_.pool(kNode).Acquire(1)) {
    all.push_back(std::move(*buffer));
  }
  peer.Send(peer.Header(FrameType::kHeartbeat, 1));
  peer.Wait();
  EXPECT_EQ(peer.Received(FrameType::kHeartbeatReply), 1u);
}

TEST_F(Session, SilenceBecomesSlowSuspectAndDownOnTime) {
  AddNode(0, PeerInfo{kPeer, Incarnation(), SimWorld::AddressOf(kPeer)});
  RawPeer peer(world_, kPeer);
  peer.Wait();  // accepts the node's connection and takes its hello
  peer.SayHello(peer.GoodHello(), FrameType::kHelloReply);
  const TimePoint start = world_.Now();
  // It never answers a heartbeat; the first one left with the handshake.
  const std::pair<LinkState, Duration> expected[] = {{LinkState::kUp, milliseconds(0)},
                                                     {LinkState::kSlow, milliseconds(250)},
                                                     {LinkState::kSuspect, seconds(1)},
                                                     {LinkState::kDown, seconds(2)}};
  for (size_t i = 0; i < std::size(expected); ++i) {
    ASSERT_TRUE(world_.RunUntil([&] { return log_.links.size() > i; }, seconds(3)));
    EXPECT_EQ(log_.links[i].state, expected[i].first);
    EXPECT_EQ(log_.links[i].incarnation, Incarnation(5));
    const Duration after = world_.Now() - start;
    EXPECT_GE(after, expected[i].second);
    EXPECT_LE(after, expected[i].second + milliseconds(5));
  }
  EXPECT_EQ(log_.links.back().reason, "no heartbeat answer");
}

TEST_F(Session, AnAnswerThatComesLateMakesASlowLinkUpAgain) {
  AddNode(0, PeerInfo{kPeer, Incarnation(), SimWorld::AddressOf(kPeer)});
  RawPeer peer(world_, kPeer);
  peer.Wait();
  peer.SayHello(peer.GoodHello(), FrameType::kHelloReply);
  ASSERT_TRUE(world_.RunUntil([&] { return log_.links.size() == 2; }, seconds(1)));
  ASSERT_EQ(log_.links[1].state, LinkState::kSlow);
  peer.Send(peer.Header(FrameType::kHeartbeatReply, 1));
  peer.Wait();
  ASSERT_EQ(log_.links.size(), 3u);
  EXPECT_EQ(log_.links[2].state, LinkState::kUp);
}

TEST(SessionPair, DiallingNobodyBacksOffWithJitter) {
  std::vector<Duration> first_gaps;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SimOptions options = FixedDelay();
    options.close_notice_max = options.delay_max;
    SimWorld world(seed, options);
    ActorLog log;
    world.AddNode(kNode, Options(), Buffers(), [&log](Node& node) {
      node.AddActor(kActor, std::make_unique<Recorder>(
                                log, 0, PeerInfo{kPeer, {}, SimWorld::AddressOf(kPeer)}));
    });
    std::vector<TimePoint> downs;
    while (downs.size() < 12) {
      const size_t before = log.links.size();
      ASSERT_TRUE(world.RunUntil([&] { return log.links.size() > before; }, seconds(10)));
      EXPECT_EQ(log.links.back().state, LinkState::kDown);
      downs.push_back(world.Now());
    }
    Duration nominal = milliseconds(50);
    for (size_t i = 1; i < downs.size(); ++i) {
      const Duration gap = downs[i] - downs[i - 1];
      EXPECT_GE(gap, nominal / 2);
      EXPECT_LE(gap, nominal + milliseconds(1));
      nominal = std::min<Duration>(nominal * 2, seconds(2));
    }
    first_gaps.push_back(downs[1] - downs[0]);
  }
  std::sort(first_gaps.begin(), first_gaps.end());
  EXPECT_GT(first_gaps.back() - first_gaps.front(), milliseconds(10)) << "no jitter";
}

TEST(SessionPair, APauseOfTheWholeMachineBreaksNoLink) {
  // Two nodes driven by hand: neither runs for three seconds, so that neither can have answered.
  SimWorld world(1, FixedDelay());
  SimTransport& first = world.AddBareTransport(kNode, Buffers());
  SimTransport& second = world.AddBareTransport(kPeer, Buffers());
  ActorLog log;
  ActorLog other_log;
  const auto options = [](NodeId id) {
    NodeOptions made = Options();
    made.identity.node = id;
    made.identity.incarnation = Incarnation(1);
    made.simulated_compute_delay = [] { return Duration(1); };
    return made;
  };
  Node dialling(options(kNode), first, world.clock(), world.pool(kNode));
  Node answering(options(kPeer), second, world.clock(), world.pool(kPeer));
  dialling.AddActor(
      kActor, std::make_unique<Recorder>(log, 0, PeerInfo{kPeer, {}, SimWorld::AddressOf(kPeer)}));
  answering.AddActor(kActor, std::make_unique<Recorder>(other_log, 0, std::nullopt));
  const auto run = [&](Duration time) {
    for (Duration passed{}; passed < time; passed += milliseconds(1)) {
      world.RunFor(milliseconds(1));
      while (dialling.RunOnce() || answering.RunOnce()) {
      }
    }
  };
  run(milliseconds(500));
  ASSERT_EQ(log.links.size(), 1u);
  for (int pause = 0; pause < 20; ++pause) {
    run(milliseconds(7));  // the pause begins at many moments of the heartbeat's way
    world.RunFor(seconds(3));
  }
  run(milliseconds(500));
  EXPECT_EQ(log.links.size(), 1u) << log.links.back().reason;
  EXPECT_EQ(dialling.counters().sessions_closed, 0u);
  EXPECT_EQ(answering.counters().sessions_closed, 0u);
  // But a peer that alone stays away is still found out.
  for (int i = 0; i < 3000; ++i) {
    world.RunFor(milliseconds(1));
    while (dialling.RunOnce()) {
    }
  }
  EXPECT_EQ(log.links.back().state, LinkState::kDown);
}

TEST(SessionPair, ASecondWatcherIsToldOfALinkThatIsUp) {
  SimWorld world(1);
  ActorLog first_log;
  ActorLog second_log;
  const PeerInfo server{kPeer, {}, SimWorld::AddressOf(kPeer)};
  // Connects when a frame tells it to, long after the first.
  class Late final : public Actor {
   public:
    Late(ActorLog& log, PeerInfo server) : log_(log), server_(std::move(server)) {}
    void Start(Context& context) override { context.SetTimer(seconds(1), 0); }
    void Receive(Message message, Context& context) override {
      if (std::get_if<TimerFired>(&message) != nullptr) context.Connect(server_);
      if (const auto* link = std::get_if<LinkChanged>(&message)) log_.links.push_back(*link);
    }

   private:
    ActorLog& log_;
    PeerInfo server_;
  };
  ActorLog server_log;
  world.AddNode(kPeer, Options(), Buffers(), [&](Node& node) {
    node.AddActor(kActor, std::make_unique<Recorder>(server_log, 0, std::nullopt));
  });
  world.AddNode(kNode, Options(), Buffers(), [&](Node& node) {
    node.AddActor(kActor, std::make_unique<Recorder>(first_log, 0, server));
    node.AddActor(ActorId(65), std::make_unique<Late>(second_log, server));
  });
  ASSERT_TRUE(world.RunUntil([&] { return !second_log.links.empty(); }, seconds(5)));
  EXPECT_EQ(second_log.links[0].state, LinkState::kUp);
  EXPECT_EQ(second_log.links[0].incarnation, Incarnation(1));
  EXPECT_EQ(first_log.links.size(), 1u);
  world.Crash(kPeer);
  ASSERT_TRUE(world.RunUntil([&] { return second_log.links.size() == 2; }, seconds(5)));
  EXPECT_EQ(second_log.links[1].state, LinkState::kDown);
  EXPECT_EQ(first_log.links.size(), 2u);
}

}  // namespace
}  // namespace moebius::runtime
