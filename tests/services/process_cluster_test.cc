// Goal: separate processes give the tokens and row digests of one process, whatever the number of
// expert workers, the load and the chunking; and they refuse, preempt, restart and drain as
// promised. Method: real binaries, UCX and gRPC on loopback; the yardstick is LocalEngine on the
// same requests.

#include <signal.h>
#include <sys/wait.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gtest/gtest.h"
#include "tests/services/process_cluster.h"

namespace moebius::services {
namespace {

// The expert workers' node numbers: counters are named expert/NODE/NAME.
std::set<std::string> ExpertNodes(ScopedCluster& cluster) {
  std::set<std::string> nodes;
  for (const auto& [name, value] : cluster.Counters()) {
    const std::vector<std::string> parts = absl::StrSplit(name, '/');
    if (parts.size() == 3 && parts[0] == "expert") nodes.insert(parts[1]);
  }
  return nodes;
}

TEST(ProcessCluster, GivesTheBitsOfOneProcessForAnyNumberOfExpertWorkers) {
  const std::vector<Result> expected = Yardstick(16);
  for (int experts : {1, 2, 3, 5}) {
    for (int chunk : {16, 512}) {
      LocalClusterOptions options;
      options.experts = experts;
      options.prefill_chunk = chunk;
      ScopedCluster cluster(options);
      const std::string what = absl::StrCat(experts, " expert workers, chunk ", chunk);
      std::unique_ptr<GenerationClient> client = cluster.Client();
      for (int i : {0, 1})
        ExpectSame(Generate(*client, MakeRequest(i)), expected[i], what + ", alone");
      const std::vector<Result> together = Concurrently(cluster->address(), 16);
      for (int i = 0; i < 16; ++i)
        ExpectSame(together[i], expected[i], absl::StrCat(what, ", request ", i, " of 16"));
      int workers = 0;
      for (const auto& [name, value] : cluster.Counters()) {
        if (!absl::StartsWith(name, "expert/") || !absl::EndsWith(name, "/rows_served")) continue;
        ++workers;
        EXPECT_GT(value, 0u) << what;
      }
      EXPECT_EQ(workers, experts);
    }
  }
}

TEST(ProcessCluster, HalfTheBlocksPreemptAndChangeNothing) {
  constexpr int kRequests = 64;
  constexpr int64_t kTokens = 70;  // every sequence needs a second block, some a fourth
  const std::vector<Result> expected = Yardstick(kRequests, kTokens);
  int64_t need = 0;
  for (int i = 0; i < kRequests; ++i) {
    need += (MakeRequest(i, kTokens).token_ids().ids_size() + kTokens + 63) / 64;
  }
  LocalClusterOptions options;
  options.num_blocks = static_cast<int>(need / 2);
  ScopedCluster cluster(options);
  const std::vector<Result> results = Concurrently(cluster->address(), kRequests, kTokens);
  for (int i = 0; i < kRequests; ++i)
    ExpectSame(results[i], expected[i], absl::StrCat("request ", i));
  uint64_t preemptions = 0, total = 0, used = 1;
  for (const auto& [name, value] : cluster.Counters()) {
    if (absl::EndsWith(name, "/preemptions")) preemptions = value;
    if (absl::EndsWith(name, "/blocks_total")) total = value;
    if (absl::EndsWith(name, "/blocks_used")) used = value;
  }
  std::printf("%lu preemptions, %lu blocks for a need of %ld\n", preemptions, total,
              static_cast<long>(need));
  EXPECT_GE(preemptions, 20u);
  EXPECT_EQ(total, static_cast<uint64_t>(need / 2));
  EXPECT_EQ(used, 0u) << "every block came back";
}

TEST(ProcessCluster, ABadRequestIsRefusedOverTheWire) {
  ScopedCluster cluster(LocalClusterOptions{});
  std::unique_ptr<GenerationClient> client = cluster.Client();
  const auto expect = [&](v1::GenerateRequest request, absl::StatusCode code,
                          const std::string& field) {
    const Result result = Generate(*client, request);
    EXPECT_EQ(result.status.code(), code) << result.status;
    EXPECT_NE(std::string(result.status.message()).find(field), std::string::npos) << result.status;
  };
  expect({}, absl::StatusCode::kInvalidArgument, "input");
  v1::GenerateRequest negative = MakeRequest(0);
  negative.set_max_tokens(-3);
  expect(negative, absl::StatusCode::kInvalidArgument, "max_tokens");
  v1::GenerateRequest unknown = MakeRequest(0);
  unknown.set_model("nobody");
  expect(unknown, absl::StatusCode::kNotFound, "model");
  v1::GenerateRequest id = MakeRequest(0);
  id.mutable_token_ids()->add_ids(99999);
  expect(id, absl::StatusCode::kInvalidArgument, "token_ids[");
  EXPECT_TRUE(Generate(*client, MakeRequest(1)).status.ok()) << "and it still serves";
}

TEST(ProcessCluster, ASecondUpIsRefusedWhileTheFirstSupervises) {
  // Adopting, once the first is gone: restart_test and no_process_left_test.
  ScopedCluster cluster(LocalClusterOptions{});
  LocalClusterOptions again = cluster.options();
  for (const bool adopt : {false, true}) {
    again.adopt = adopt;
    EXPECT_EQ(LocalCluster::Start(again, [](const std::string&) {}).status().code(),
              absl::StatusCode::kAlreadyExists);
  }
  EXPECT_TRUE(Generate(*cluster.Client(), MakeRequest(1)).status.ok());
}

TEST(ProcessCluster, AKilledExpertWorkerCostsAWaitAndNotOneToken) {
  // One replica of each expert: the request waits until the supervisor has brought a worker back,
  // and goes on.
  constexpr int64_t kTokens = 400;
  const std::vector<Result> expected = Yardstick(4, kTokens);
  ScopedCluster cluster(LocalClusterOptions{});
  const std::set<std::string> nodes = ExpertNodes(cluster);
  ASSERT_EQ(nodes.size(), 2u);
  std::atomic<bool> done{false};
  std::vector<Result> results;
  std::thread load([&] {
    results = Concurrently(cluster->address(), 4, kTokens);
    done = true;
  });
  bool killed = false;
  while (!done) {
    if (!killed) {
      for (const auto& [name, value] : cluster.Counters()) {
        if (absl::EndsWith(name, "/tokens_out") && absl::StartsWith(name, "attention/") &&
            value > 40)
          killed = true;
      }
      if (killed) kill(cluster.Pid("expert-1"), SIGKILL);
    }
    cluster->Supervise();
  }
  load.join();
  ASSERT_TRUE(killed);
  for (int i = 0; i < 4; ++i) {
    ExpectSame(results[i], expected[i], absl::StrCat("request ", i));
    std::printf("request %d paused for %.0f ms at most\n", i,
                std::chrono::duration<double, std::milli>(results[i].longest_pause).count());
    // Nobody waits for a lease (3 s) to lapse: the next incarnation is known for what it is.
    EXPECT_LT(results[i].longest_pause, std::chrono::milliseconds(2500));
  }
  // It came back as the next incarnation of the same node: its experts moved nowhere.
  EXPECT_EQ(ExpertNodes(cluster), nodes);
}

TEST(ProcessCluster, SigtermFinishesWhatIsAboard) {
  constexpr int64_t kTokens = 200;
  const std::vector<Result> expected = Yardstick(2, kTokens);
  ScopedCluster cluster(LocalClusterOptions{});
  std::unique_ptr<GenerationClient> client = cluster.Client();
  Result result;
  bool signalled = false;
  result.status = client->Generate(MakeRequest(1, kTokens), [&](const v1::GenerateEvent& event) {
    if (event.has_token()) {
      result.ids.push_back(event.token_id());
      result.digests.push_back(event.row_digest());
    }
    if (!signalled) {
      signalled = true;
      for (const char* name : {"gateway", "attention-0", "expert-0", "expert-1", "controller"}) {
        kill(cluster.Pid(name), SIGTERM);
      }
    }
  });
  // Every role keeps what the stream needs until the stream has ended.
  ExpectSame(result, expected[1], "drained stream");
  // And then each ends by itself: it is not killed for being slow, and has no error to report.
  for (const char* name : {"gateway", "attention-0", "expert-0", "expert-1", "controller"}) {
    siginfo_t how = {};
    ASSERT_EQ(waitid(P_PID, static_cast<id_t>(cluster.Pid(name)), &how, WEXITED | WNOWAIT), 0);
    EXPECT_EQ(how.si_code, CLD_EXITED) << name;
    EXPECT_EQ(how.si_status, 0) << name;
  }
}

}  // namespace
}  // namespace moebius::services
