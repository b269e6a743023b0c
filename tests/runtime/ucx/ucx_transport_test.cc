// UCX keeps the transport contract. A killed peer is a transport destroyed without a word in the
// harness; one test kills a real process with SIGKILL.

#include "runtime/ucx/ucx_transport.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/check.h"
#include "tests/runtime/transport_conformance.h"

namespace moebius::runtime {
namespace {

std::vector<BufferClass> Buffers() { return {{4096, 256}, {65536, 320}, {4 << 20, 16}}; }

std::unique_ptr<Transport> Make(const std::string& address, BufferPool& pool) {
  ucx::UcxOptions options;
  options.bind_address = address;
  absl::StatusOr<std::unique_ptr<Transport>> transport = ucx::MakeUcxTransport(options, pool);
  CHECK(transport.ok());
  return *std::move(transport);
}

class UcxHarness {
 public:
  UcxHarness()
      : server_pool_(Buffers()),
        client_pool_(Buffers()),
        server_(Make("127.0.0.1:0", server_pool_)),
        client_(Make("127.0.0.1:0", client_pool_)),
        address_(server_->ListenAddress()) {}
  Transport& server() { return *server_; }
  Transport& client() { return *client_; }
  BufferPool& server_pool() { return server_pool_; }
  BufferPool& client_pool() { return client_pool_; }
  // Real time passes by itself; on a busy machine polling alone would use up the bound before the
  // other side has run.
  void Advance() {
    if (server_ != nullptr && (++advances_ % 2 == 0)) server_->Wait(std::chrono::milliseconds(1));
    client_->Wait(std::chrono::milliseconds(1));
  }
  void KillServer() { server_.reset(); }
  void RestartServer() { server_ = Make(address_, server_pool_); }

 private:
  BufferPool server_pool_;
  BufferPool client_pool_;
  std::unique_ptr<Transport> server_;
  std::unique_ptr<Transport> client_;
  std::string address_;
  uint64_t advances_ = 0;
};

INSTANTIATE_TYPED_TEST_SUITE_P(Ucx, TransportConformance, UcxHarness);

TEST(UcxTransport, AProcessKilledWithSigkillClosesTheConnection) {
  int pipe_fds[2];
  ASSERT_EQ(pipe(pipe_fds), 0);
  const pid_t child = fork();  // before this process has made any UCX object of its own here
  ASSERT_GE(child, 0);
  if (child == 0) {
    BufferPool pool(Buffers());
    std::unique_ptr<Transport> server = Make("127.0.0.1:0", pool);
    const std::string address = server->ListenAddress() + "\n";
    if (write(pipe_fds[1], address.data(), address.size()) < 0) _exit(1);
    std::vector<TransportEvent> events;
    while (true) {
      server->Poll(events);
      events.clear();
      server->Wait(std::chrono::milliseconds(100));
    }
  }
  std::string address;
  for (char c; read(pipe_fds[0], &c, 1) == 1 && c != '\n';) address += c;
  BufferPool pool(Buffers());
  std::unique_ptr<Transport> client = Make("127.0.0.1:0", pool);
  const ConnectionId connection = client->Connect(address);
  EventLog log;
  uint64_t sent = 0;
  bool killed = false;
  for (int i = 0; i < kMaxAdvances && log.Find(TransportEvent::Kind::kClosed) == nullptr; ++i) {
    log.Take(*client);
    if (std::optional<Buffer> buffer = pool.in_use() < 40 ? pool.Acquire(60000) : std::nullopt) {
      Frame frame;
      frame.payload = std::move(*buffer);
      wire::SealFrame(frame.header, frame.payload.bytes());
      sent += client->Send(connection, frame) == SendResult::kSent ? 1 : 0;
    }
    if (sent > 100 && !killed) {
      killed = true;
      kill(child, SIGKILL);
    }
    client->Wait(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(killed);
  EXPECT_NE(log.Find(TransportEvent::Kind::kClosed), nullptr);
  EXPECT_EQ(pool.in_use(), 0u);
  waitpid(child, nullptr, 0);
}

TEST(UcxTransport, FramesThatFindNoBufferAreBounded) {
  BufferPool server_pool({{4096, 1}});
  BufferPool client_pool(Buffers());
  ucx::UcxOptions options;
  options.max_waiting_frames = 100;
  auto opened = ucx::MakeUcxTransport(options, server_pool);
  ASSERT_TRUE(opened.ok());
  std::unique_ptr<Transport> server = *std::move(opened);
  std::unique_ptr<Transport> client = Make("127.0.0.1:0", client_pool);
  const ConnectionId connection = client->Connect(server->ListenAddress());
  const std::optional<Buffer> taken = server_pool.Acquire(1);
  EventLog server_log;
  EventLog client_log;
  for (int i = 0; i < kMaxAdvances && client_log.Find(TransportEvent::Kind::kClosed) == nullptr;
       ++i) {
    Frame frame;
    frame.payload = *client_pool.Acquire(200);
    wire::SealFrame(frame.header, frame.payload.bytes());
    (void)client->Send(connection, frame);
    server_log.Take(*server);
    client_log.Take(*client);
  }
  ASSERT_NE(server_log.Find(TransportEvent::Kind::kClosed), nullptr);
  EXPECT_EQ(server_log.Find(TransportEvent::Kind::kClosed)->status.code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(server_log.Count(TransportEvent::Kind::kFrame), 0u);
  EXPECT_NE(client_log.Find(TransportEvent::Kind::kClosed), nullptr);
}

TEST(UcxTransport, ABadAddressIsAnError) {
  BufferPool pool(Buffers());
  for (const char* address : {"", "127.0.0.1", "localhost:1", "127.0.0.1:99999", "127.0.0.1:x"}) {
    ucx::UcxOptions options;
    options.bind_address = address;
    EXPECT_EQ(ucx::MakeUcxTransport(options, pool).status().code(),
              absl::StatusCode::kInvalidArgument)
        << address;
  }
}

}  // namespace
}  // namespace moebius::runtime
