#pragma once

// What every Transport promises (runtime/transport.h), as one suite that runs on the simulated
// network and on UCX, so that the simulator cannot drift from what it stands for.
//
// A harness gives two transports and drives time:
//   struct Harness { Transport& server(); Transport& client(); BufferPool& server_pool();
//   BufferPool& client_pool();
//                    void Advance();          // a little time passes (virtual or real)
//                    void KillServer();       // as SIGKILL would: nothing is said goodbye
//                    void RestartServer(); }; // at the same address
// Advance is called until a condition holds or kMaxAdvances is reached: no test sleeps.

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/prng.h"
#include "gtest/gtest.h"
#include "runtime/transport.h"

namespace moebius::runtime {

inline constexpr int kMaxAdvances = 200000;

// Events of one transport, collected.
struct EventLog {
  std::vector<TransportEvent> events;
  void Take(Transport& transport) { transport.Poll(events); }
  const TransportEvent* Find(TransportEvent::Kind kind) const {
    for (const TransportEvent& event : events) {
      if (event.kind == kind) return &event;
    }
    return nullptr;
  }
  size_t Count(TransportEvent::Kind kind) const {
    size_t count = 0;
    for (const TransportEvent& event : events) count += event.kind == kind ? 1 : 0;
    return count;
  }
};

template <typename Harness>
class TransportConformance : public testing::Test {
 protected:
  using Kind = TransportEvent::Kind;

  bool Until(const std::function<bool()>& done) {
    for (int i = 0; i < kMaxAdvances; ++i) {
      if (server_alive_) server_.Take(harness_.server());
      client_.Take(harness_.client());
      if (done()) return true;
      harness_.Advance();
    }
    return false;
  }

  // A frame whose payload is a function of `number`, so that a misplaced one names itself.
  static Frame MakeFrame(BufferPool& pool, uint64_t number, size_t bytes) {
    std::optional<Buffer> buffer = pool.Acquire(bytes);
    EXPECT_TRUE(buffer.has_value());
    Prng prng(number);
    for (size_t at = 0; at + 8 <= bytes; at += 8) {
      const uint64_t word = prng.Next();
      std::memcpy(buffer->data() + at, &word, 8);
    }
    Frame frame;
    frame.header.type = static_cast<uint16_t>(wire::FrameType::kTest);
    frame.header.correlation = number;
    frame.payload = std::move(*buffer);
    wire::SealFrame(frame.header, frame.payload.bytes());
    return frame;
  }

  static void ExpectWhole(const Frame& frame) {
    wire::FrameHeader header;
    EXPECT_TRUE(wire::ValidateFrame(
                    {reinterpret_cast<const std::byte*>(&frame.header), sizeof(frame.header)},
                    frame.payload.bytes(), UINT64_MAX, &header)
                    .ok());
  }

  // Connects and exchanges one frame, so that both ends exist.
  void Establish() {
    connection_ = harness_.client().Connect(harness_.server().ListenAddress());
    ASSERT_TRUE(Until([&] { return client_.Find(Kind::kConnected) != nullptr; }));
    Frame frame = MakeFrame(harness_.client_pool(), 0, 64);
    ASSERT_EQ(harness_.client().Send(connection_, frame), SendResult::kSent);
    ASSERT_TRUE(Until([&] { return server_.Find(Kind::kFrame) != nullptr; }));
    ASSERT_NE(server_.Find(Kind::kAccepted), nullptr);
    server_connection_ = server_.Find(Kind::kAccepted)->connection;
    server_.events.clear();
    client_.events.clear();
  }

  void Kill() {
    server_.events.clear();
    server_alive_ = false;
    harness_.KillServer();
  }
  void AwaitClosed() {
    ASSERT_TRUE(Until([&] { return client_.Find(Kind::kClosed) != nullptr; }));
  }
  // The client has noticed; a successor is there, and a connection to it.
  void Succeed() {
    AwaitClosed();
    client_.events.clear();
    harness_.RestartServer();
    server_alive_ = true;
    Establish();
  }

  Harness harness_;
  EventLog server_;
  EventLog client_;
  ConnectionId connection_ = 0;
  ConnectionId server_connection_ = 0;
  bool server_alive_ = true;
};

TYPED_TEST_SUITE_P(TransportConformance);

TYPED_TEST_P(TransportConformance, FramesArriveWholeAndInOrderSmallAndLargeMixed) {
  using Kind = TransportEvent::Kind;
  this->Establish();
  // Below and above every threshold of eager and rendezvous sending, several MB at most.
  const size_t sizes[] = {8,      64,     4096,    8192,    20000, 65536,
                          262144, 300000, 1 << 20, 3 << 20, 128,   16};
  uint64_t sent = 0;
  const uint64_t total = 60;
  ASSERT_TRUE(this->Until([&] {
    while (sent < total) {
      if (this->harness_.client_pool().in_use() > 8) break;
      Frame frame =
          this->MakeFrame(this->harness_.client_pool(), sent + 1, sizes[sent % std::size(sizes)]);
      if (this->harness_.client().Send(this->connection_, frame) != SendResult::kSent) break;
      ++sent;
    }
    for (TransportEvent& event : this->server_.events) {
      if (event.kind != Kind::kFrame || event.frame.payload.empty()) continue;
      this->ExpectWhole(event.frame);
      event.frame.payload = Buffer();
    }
    return this->server_.Count(Kind::kFrame) == total;
  }));
  uint64_t expected = 0;
  for (const TransportEvent& event : this->server_.events) {
    if (event.kind != Kind::kFrame) continue;
    EXPECT_EQ(event.frame.header.correlation, ++expected);
  }
}

TYPED_TEST_P(TransportConformance, AnswersTravelOverTheAcceptedConnection) {
  using Kind = TransportEvent::Kind;
  this->Establish();
  Frame frame = this->MakeFrame(this->harness_.server_pool(), 9, 1000);
  ASSERT_EQ(this->harness_.server().Send(this->server_connection_, frame), SendResult::kSent);
  ASSERT_TRUE(this->Until([&] { return this->client_.Find(Kind::kFrame) != nullptr; }));
  EXPECT_EQ(this->client_.Find(Kind::kFrame)->connection, this->connection_);
  EXPECT_EQ(this->client_.Find(Kind::kFrame)->frame.header.correlation, 9u);
}

TYPED_TEST_P(TransportConformance, AFullQueueRefusesAndAnnouncesWhenItDrains) {
  using Kind = TransportEvent::Kind;
  this->Establish();
  // Nobody polls the server: its side fills, then ours.
  uint64_t sent = 0;
  SendResult result = SendResult::kSent;
  while (sent < 10000) {
    Frame frame;
    frame.header.correlation = sent + 1;
    if (this->harness_.client_pool().in_use() < 300) {
      frame = this->MakeFrame(this->harness_.client_pool(), sent + 1, 60000);
    } else {
      wire::SealFrame(frame.header, {});
    }
    result = this->harness_.client().Send(this->connection_, frame);
    if (result != SendResult::kSent) break;
    ++sent;
  }
  ASSERT_EQ(result, SendResult::kBusy);
  ASSERT_TRUE(this->Until([&] {
    for (TransportEvent& event : this->server_.events) event.frame.payload = Buffer();
    return this->client_.Find(Kind::kWritable) != nullptr &&
           this->server_.Count(Kind::kFrame) == sent;
  }));
  Frame frame = this->MakeFrame(this->harness_.client_pool(), sent + 1, 64);
  EXPECT_EQ(this->harness_.client().Send(this->connection_, frame), SendResult::kSent);
}

TYPED_TEST_P(TransportConformance, ADeadPeerClosesTheConnectionAndEveryBufferComesBack) {
  using Kind = TransportEvent::Kind;
  this->Establish();
  for (uint64_t i = 0; i < 8; ++i) {  // in flight when it dies: some may be "sent" and never arrive
    Frame frame = this->MakeFrame(this->harness_.client_pool(), i + 1, 500000);
    ASSERT_NE(this->harness_.client().Send(this->connection_, frame), SendResult::kUnreachable);
  }
  this->Kill();
  this->AwaitClosed();
  EXPECT_FALSE(this->client_.Find(Kind::kClosed)->status.ok());
  EXPECT_EQ(this->harness_.client_pool().in_use(), 0u);
  Frame frame = this->MakeFrame(this->harness_.client_pool(), 1, 64);
  EXPECT_EQ(this->harness_.client().Send(this->connection_, frame), SendResult::kUnreachable);
}

TYPED_TEST_P(TransportConformance, ARestartedPeerIsReachedAtTheSameAddress) {
  this->Establish();
  this->Kill();
  this->Succeed();
}

// Completion is local: the buffer is free, and nobody may conclude that the frame arrived.
TYPED_TEST_P(TransportConformance, ASendThatCompletedMayNeverArrive) {
  using Kind = TransportEvent::Kind;
  this->Establish();
  constexpr uint64_t kLost = 77;
  Frame frame = this->MakeFrame(this->harness_.client_pool(), kLost, 200);
  ASSERT_EQ(this->harness_.client().Send(this->connection_, frame), SendResult::kSent);
  // The server is alive and does not look: it is killed before it reads what lies there.
  for (int i = 0; i<kMaxAdvances&& this->harness_.client_pool().in_use()> 0; ++i) {
    this->client_.Take(this->harness_.client());
    this->harness_.Advance();
  }
  ASSERT_EQ(this->harness_.client_pool().in_use(), 0u) << "the send did not complete";
  ASSERT_EQ(this->client_.Find(Kind::kClosed), nullptr);
  this->Kill();
  this->Succeed();
  Frame after = this->MakeFrame(this->harness_.client_pool(), kLost + 1, 200);
  ASSERT_EQ(this->harness_.client().Send(this->connection_, after), SendResult::kSent);
  ASSERT_TRUE(this->Until([&] { return this->server_.Find(Kind::kFrame) != nullptr; }));
  ASSERT_EQ(this->server_.Count(Kind::kFrame), 1u);
  EXPECT_EQ(this->server_.Find(Kind::kFrame)->frame.header.correlation, kLost + 1);
}

// What was said to the old incarnation of a peer never reaches the new one, and the other way
// round: a connection belongs to the two processes that made it.
TYPED_TEST_P(TransportConformance, AConnectionToAnOldIncarnationStaysClosed) {
  using Kind = TransportEvent::Kind;
  this->Establish();
  const ConnectionId old_connection = this->connection_;
  this->Kill();
  this->harness_.RestartServer();
  this->server_alive_ = true;
  // The client may not have noticed yet: what it sends now is for the old incarnation.
  uint64_t stale = 100;
  ASSERT_TRUE(this->Until([&] {
    if (this->harness_.client_pool().in_use() < 16) {
      Frame frame = this->MakeFrame(this->harness_.client_pool(), stale, 200);
      if (this->harness_.client().Send(old_connection, frame) == SendResult::kSent) ++stale;
    }
    return this->client_.Find(Kind::kClosed) != nullptr;
  }));
  EXPECT_EQ(this->client_.Find(Kind::kClosed)->connection, old_connection);
  EXPECT_EQ(this->server_.Count(Kind::kFrame), 0u);
  this->client_.events.clear();
  this->Establish();
  EXPECT_NE(this->connection_, old_connection);
  Frame frame = this->MakeFrame(this->harness_.client_pool(), 1, 64);
  EXPECT_EQ(this->harness_.client().Send(old_connection, frame), SendResult::kUnreachable);
  Frame good = this->MakeFrame(this->harness_.client_pool(), 2, 64);
  ASSERT_EQ(this->harness_.client().Send(this->connection_, good), SendResult::kSent);
  ASSERT_TRUE(this->Until([&] { return this->server_.Find(Kind::kFrame) != nullptr; }));
  ASSERT_EQ(this->server_.Count(Kind::kFrame), 1u);
  EXPECT_EQ(this->server_.Find(Kind::kFrame)->frame.header.correlation, 2u);
}

TYPED_TEST_P(TransportConformance, ConnectingToNobodyCloses) {
  using Kind = TransportEvent::Kind;
  const std::string address = this->harness_.server().ListenAddress();
  this->Kill();
  const ConnectionId connection = this->harness_.client().Connect(address);
  // UCX connects lazily: the first send is what fails.
  this->Until([&] {
    return this->client_.Find(Kind::kConnected) != nullptr ||
           this->client_.Find(Kind::kClosed) != nullptr;
  });
  Frame frame = this->MakeFrame(this->harness_.client_pool(), 1, 64);
  (void)this->harness_.client().Send(connection, frame);
  ASSERT_TRUE(this->Until([&] { return this->client_.Find(Kind::kClosed) != nullptr; }));
}

TYPED_TEST_P(TransportConformance, ClosingTellsBothSidesOnce) {
  using Kind = TransportEvent::Kind;
  this->Establish();
  this->harness_.client().Close(this->connection_);
  this->harness_.client().Close(this->connection_);
  ASSERT_TRUE(this->Until([&] {
    return this->client_.Count(Kind::kClosed) == 1 && this->server_.Count(Kind::kClosed) == 1;
  }));
  for (int i = 0; i < 100; ++i) {
    this->harness_.Advance();
    this->client_.Take(this->harness_.client());
    this->server_.Take(this->harness_.server());
  }
  EXPECT_EQ(this->client_.Count(Kind::kClosed), 1u);
  EXPECT_EQ(this->server_.Count(Kind::kClosed), 1u);
}

REGISTER_TYPED_TEST_SUITE_P(TransportConformance, FramesArriveWholeAndInOrderSmallAndLargeMixed,
                            AnswersTravelOverTheAcceptedConnection,
                            AFullQueueRefusesAndAnnouncesWhenItDrains,
                            ADeadPeerClosesTheConnectionAndEveryBufferComesBack,
                            ARestartedPeerIsReachedAtTheSameAddress,
                            ASendThatCompletedMayNeverArrive,
                            AConnectionToAnOldIncarnationStaysClosed, ConnectingToNobodyCloses,
                            ClosingTellsBothSidesOnce);

}  // namespace moebius::runtime
