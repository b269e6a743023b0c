// Goal: the controller and the supervisor may die at any moment: what is being generated finishes,
// what is asked later succeeds, with the same bits, and their successors take over. Method:
// SIGKILL during a stream; requests go on without a pause meanwhile.

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gtest/gtest.h"
#include "model/file_io.h"
#include "services/cli/cluster_file.h"
#include "tests/services/process_cluster.h"
#include "tests/services/raw_call.h"

namespace moebius::services {
namespace {

// A request that runs on a thread of its own; waits for its first token.
class Running {
 public:
  Running(const std::string& address, const v1::GenerateRequest& request) {
    ClientFlags flags;
    flags.address = address;
    client_ = *GenerationClient::Open(flags);
    thread_ = std::thread([this, request] {
      result_.status = client_->Generate(request, [this](const v1::GenerateEvent& event) {
        if (event.has_token()) {
          result_.ids.push_back(event.token_id());
          result_.digests.push_back(event.row_digest());
        }
        Tell(started_);
      });
      Tell(started_);
      done_ = true;
    });
    started_.wait(false);
  }
  ~Running() {
    if (thread_.joinable()) thread_.join();
  }
  bool done() const { return done_; }
  const Result& Join() {
    thread_.join();
    return result_;
  }

 private:
  static void Tell(std::atomic<bool>& flag) {
    flag = true;
    flag.notify_all();
  }
  std::unique_ptr<GenerationClient> client_;
  std::atomic<bool> started_{false}, done_{false};
  Result result_;
  std::thread thread_;
};

TEST(Restart, AKilledControllerCostsNothing) {
  constexpr int64_t kTokens = 900;
  const std::unique_ptr<GenerationClient> one = OneProcess();
  const Result expected_long = Generate(*one, MakeRequest(1, kTokens));
  const Result expected = Generate(*one, MakeRequest(2));
  ScopedCluster cluster(LocalClusterOptions{});
  const std::string address = cluster->address();
  const std::unique_ptr<GenerationClient> client = cluster.Client();
  Running running(address, MakeRequest(1, kTokens));
  const uint64_t epoch = Counters(address)["placement_epoch"];
  kill(cluster.Pid("controller"), SIGKILL);
  // Until the new controller has placed, has counted who renewed and who is gone, and the stream
  // has ended; and once more.
  int served = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (bool last = false; !last && std::chrono::steady_clock::now() < end;) {
    std::map<std::string, uint64_t> counters = Counters(address);
    last = running.done() && counters["placement_epoch"] > epoch &&
           counters["controller_settled"] == 1;
    cluster->Supervise();
    ExpectSame(Generate(*client, MakeRequest(2)), expected, absl::StrCat("request ", served));
    if (HasFailure()) break;
    ++served;
  }
  ExpectSame(running.Join(), expected_long, "the stream in flight");
  EXPECT_GT(Counters(address)["placement_epoch"], epoch) << "the new controller has placed";
  EXPECT_GT(served, 3);
}

class Supervisor : public testing::Test {
 protected:
  std::unique_ptr<ServiceProcess> Up(const std::string& name, std::vector<std::string> more = {}) {
    std::vector<std::string> arguments{"up",          "--model",     kTestModel,   "--address",
                                       "127.0.0.1:0", "--state-dir", state_.path()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return std::make_unique<ServiceProcess>(folder_, name, "moebius", std::move(arguments));
  }
  // A test that failed leaves no services behind.
  void TearDown() override {
    const absl::StatusOr<SavedCluster> left = Saved();
    if (!left.ok()) return;
    for (const SavedProcess& process : left->processes) {
      if (process.pid > 0 && process.pid != getpid()) kill(process.pid, SIGKILL);
    }
  }
  std::string Address(const ServiceProcess& up) {
    const std::vector<std::string> parts = absl::StrSplit(up.Log(), "ready at ");
    return std::vector<std::string>(absl::StrSplit(parts.back(), '\n'))[0];
  }
  absl::StatusOr<SavedCluster> Saved() { return ReadClusterFile(state_.path() + "/cluster.json"); }

  ScopedFolder folder_, state_;
};

TEST_F(Supervisor, AKilledOneIsSucceededByTheNext) {
  constexpr int64_t kTokens = 400;
  const std::unique_ptr<GenerationClient> one = OneProcess();
  const Result expected_long = Generate(*one, MakeRequest(1, kTokens));
  const Result expected = Generate(*one, MakeRequest(2));
  std::unique_ptr<ServiceProcess> first = Up("first");
  ASSERT_TRUE(first->AwaitLog("ready at ").ok()) << first->Log();
  const std::string address = Address(*first);
  const absl::StatusOr<SavedCluster> saved = Saved();
  ASSERT_TRUE(saved.ok()) << saved.status();
  ASSERT_EQ(saved->processes.size(), 5u);
  ClientFlags flags;
  flags.address = address;
  const std::unique_ptr<GenerationClient> client = *GenerationClient::Open(flags);

  Running running(address, MakeRequest(1, kTokens));
  first->Signal(SIGKILL);
  EXPECT_EQ(first->Wait(), 128 + SIGKILL);
  ExpectSame(Generate(*client, MakeRequest(2)), expected, "without a supervisor");
  ExpectSame(running.Join(), expected_long, "the stream in flight");

  const std::unique_ptr<ServiceProcess> rival = Up("rival");
  EXPECT_EQ(rival->Wait(), 1);
  EXPECT_TRUE(absl::StrContains(rival->Log(), "--adopt")) << rival->Log();

  const std::unique_ptr<ServiceProcess> second = Up("second", {"--adopt"});
  ASSERT_TRUE(second->AwaitLog("ready at ").ok()) << second->Log();
  EXPECT_EQ(Address(*second), address);
  EXPECT_EQ(*Saved(), *saved) << "the same processes";
  for (const SavedProcess& process : saved->processes) {
    EXPECT_TRUE(IsRunning(process.pid)) << process.name;
  }
  ExpectSame(Generate(*client, MakeRequest(2)), expected, "adopted");

  // It restarts what it did not start itself, where clients look for it.
  for (const SavedProcess& process : saved->processes) {
    if (process.name == "gateway") kill(process.pid, SIGKILL);
  }
  ASSERT_TRUE(second->AwaitLog("restarted gateway").ok()) << second->Log();
  const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  ASSERT_TRUE(
      channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(30)));
  RawStream health(channel, "/grpc.health.v1.Health/Watch", "");
  for (std::string status; status != std::string("\x08\x01", 2);) {
    const std::optional<std::string> next = health.Read();
    ASSERT_TRUE(next.has_value());
    status = *next;
  }
  ExpectSame(Generate(**GenerationClient::Open(flags), MakeRequest(2)), expected, "restarted");

  const absl::StatusOr<SavedCluster> now = Saved();
  ASSERT_TRUE(now.ok()) << now.status();
  second->Signal(SIGTERM);
  EXPECT_EQ(second->Wait(), 0) << second->Log();
  for (const SavedProcess& process : now->processes) {
    EXPECT_FALSE(IsRunning(process.pid)) << process.name << " was drained";
  }
  EXPECT_FALSE(std::filesystem::exists(state_.path() + "/cluster.json"));
}

TEST_F(Supervisor, AProcessIdThatIsSomebodyElsesIsLeftAlone) {
  // As after a reboot: the numbers in the file belong to others now; here, to this test.
  SavedCluster stale{"127.0.0.1:1", "127.0.0.1:1", {}};
  for (const char* name : {"controller", "gateway", "attention-0", "expert-0", "expert-1"}) {
    stale.processes.push_back({name, getpid()});
  }
  ASSERT_TRUE(model::ReplaceFile(state_.path() + "/cluster.json", WriteClusterFile(stale)).ok());
  const std::unique_ptr<ServiceProcess> up = Up("up", {"--adopt"});
  ASSERT_TRUE(up->AwaitLog("ready at ").ok()) << up->Log();
  const absl::StatusOr<SavedCluster> saved = Saved();
  ASSERT_TRUE(saved.ok()) << saved.status();
  for (const SavedProcess& process : saved->processes) EXPECT_NE(process.pid, getpid());
  up->Signal(SIGTERM);
  EXPECT_EQ(up->Wait(), 0) << "and this test still runs";
}

}  // namespace
}  // namespace moebius::services
