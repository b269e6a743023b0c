// Goal: separate processes give the tokens and row digests of one process, whatever the number of
// expert workers, the load and the chunking; and they refuse, preempt, restart and drain as
// promised. Method: real binaries, UCX and gRPC on loopback; the yardstick is LocalEngine on the
// same requests.

#include <grpcpp/grpcpp.h>
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "moebius/v1/worker.grpc.pb.h"
#include "services/cli/generation_client.h"
#include "services/cli/local_cluster.h"

namespace moebius::services {
namespace {

const char* const kModel = MOEBIUS_SOURCE_DIR "/models/moebius-tiny";

class ScopedCluster {
 public:
  explicit ScopedCluster(LocalClusterOptions options) {
    options.model = kModel;
    options.listen = "127.0.0.1:0";
    options.binaries = MOEBIUS_BINARIES;
    options.state_dir = absl::StrCat(testing::TempDir(), "/moebius-", getpid(), "-", ++counter_);
    state_dir_ = options.state_dir;
    options_ = options;
    absl::StatusOr<LocalCluster> cluster = LocalCluster::Start(options, [](const std::string&) {});
    EXPECT_TRUE(cluster.ok()) << cluster.status();
    cluster_ = std::make_unique<LocalCluster>(*std::move(cluster));
    const absl::Status ready = cluster_->WaitReady(std::chrono::seconds(120));
    EXPECT_TRUE(ready.ok()) << ready;
  }
  ~ScopedCluster() {
    cluster_->Drain(std::chrono::seconds(30));
    if (!testing::Test::HasFailure()) std::filesystem::remove_all(state_dir_);
  }
  LocalCluster& operator*() { return *cluster_; }
  LocalCluster* operator->() { return cluster_.get(); }
  const LocalClusterOptions& options() const { return options_; }
  std::unique_ptr<GenerationClient> Client() {
    ClientFlags flags;
    flags.address = cluster_->address();
    return *GenerationClient::Open(flags);
  }
  pid_t Pid(const std::string& name) const {
    for (const auto& process : cluster_->processes()) {
      if (process.name == name) return process.pid;
    }
    return 0;
  }

 private:
  static inline int counter_ = 0;
  LocalClusterOptions options_;
  std::string state_dir_;
  std::unique_ptr<LocalCluster> cluster_;
};

struct Result {
  absl::Status status;
  std::vector<int32_t> ids;
  std::vector<uint64_t> digests;
  uint64_t preemptions = 0;
};

Result Generate(GenerationClient& client, const v1::GenerateRequest& request) {
  Result result;
  result.status = client.Generate(request, [&](const v1::GenerateEvent& event) {
    result.preemptions = std::max<uint64_t>(result.preemptions, event.usage().preemptions());
    if (!event.has_token()) return;
    EXPECT_EQ(event.token_index(), result.ids.size());
    result.ids.push_back(event.token_id());
    result.digests.push_back(event.row_digest());
  });
  return result;
}

// Request i: a prompt of its own length and ids; every second one is sampled at temperature 1.
v1::GenerateRequest MakeRequest(int i, int64_t max_tokens = 24) {
  v1::GenerateRequest request;
  Prng prng(static_cast<uint64_t>(i) + 1);
  const int length = 3 + static_cast<int>(prng.Below(i % 4 == 0 ? 200 : 40));
  for (int k = 0; k < length; ++k)
    request.mutable_token_ids()->add_ids(3 + static_cast<int32_t>(prng.Below(4000)));
  request.set_max_tokens(max_tokens);
  request.set_temperature(i % 2 == 0 ? 0.0f : 1.0f);
  request.set_seed(static_cast<uint64_t>(i) * 77);
  request.set_ignore_eos(true);
  return request;
}

std::vector<Result> Yardstick(int count, int64_t max_tokens = 24) {
  ClientFlags flags;
  flags.model = kModel;
  absl::StatusOr<std::unique_ptr<GenerationClient>> client = GenerationClient::Open(flags);
  EXPECT_TRUE(client.ok()) << client.status();
  std::vector<Result> results;
  for (int i = 0; i < count; ++i) results.push_back(Generate(**client, MakeRequest(i, max_tokens)));
  return results;
}

void ExpectSame(const Result& got, const Result& expected, const std::string& what) {
  ASSERT_TRUE(got.status.ok()) << what << ": " << got.status;
  EXPECT_EQ(got.ids, expected.ids) << what;
  EXPECT_EQ(got.digests, expected.digests) << what;
}

std::vector<Result> Concurrently(ScopedCluster& cluster, int count, int64_t max_tokens = 24) {
  std::vector<Result> results(static_cast<size_t>(count));
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      std::unique_ptr<GenerationClient> client = cluster.Client();
      results[static_cast<size_t>(i)] = Generate(*client, MakeRequest(i, max_tokens));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

std::map<std::string, uint64_t> Counters(ScopedCluster& cluster) {
  auto stub = v1::StatusService::NewStub(
      grpc::CreateChannel(cluster->address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  v1::StatusReply reply;
  EXPECT_TRUE(stub->Status(&context, v1::StatusRequest(), &reply).ok());
  std::map<std::string, uint64_t> counters;
  for (const v1::Counter& counter : reply.counters()) counters[counter.name()] = counter.value();
  return counters;
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
      const std::vector<Result> together = Concurrently(cluster, 16);
      for (int i = 0; i < 16; ++i)
        ExpectSame(together[i], expected[i], absl::StrCat(what, ", request ", i, " of 16"));
      int workers = 0;
      for (const auto& [name, value] : Counters(cluster)) {
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
  const std::vector<Result> results = Concurrently(cluster, kRequests, kTokens);
  for (int i = 0; i < kRequests; ++i)
    ExpectSame(results[i], expected[i], absl::StrCat("request ", i));
  uint64_t preemptions = 0, total = 0, used = 1;
  for (const auto& [name, value] : Counters(cluster)) {
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
  // Bytes that are no GenerateRequest at all.
  auto channel = grpc::CreateChannel(cluster->address(), grpc::InsecureChannelCredentials());
  grpc::ClientContext context;
  auto stub = v1::Generation::NewStub(channel);
  v1::ScoreRequest score;
  v1::ScoreReply reply;
  EXPECT_EQ(stub->Score(&context, score, &reply).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(Generate(*client, MakeRequest(1)).status.ok()) << "and it still serves";
}

TEST(ProcessCluster, ASecondUpRefusesOrAdopts) {
  ScopedCluster cluster(LocalClusterOptions{});
  LocalClusterOptions again = cluster.options();
  EXPECT_EQ(LocalCluster::Start(again, [](const std::string&) {}).status().code(),
            absl::StatusCode::kAlreadyExists);
  again.adopt = true;
  absl::StatusOr<LocalCluster> adopted = LocalCluster::Start(again, [](const std::string&) {});
  ASSERT_TRUE(adopted.ok()) << adopted.status();
  EXPECT_EQ(adopted->address(), cluster->address());
  EXPECT_TRUE(Generate(*cluster.Client(), MakeRequest(1)).status.ok());
}

TEST(ProcessCluster, AKilledExpertWorkerCostsAWaitAndNotOneToken) {
  // One replica of each expert: the request waits until the supervisor has brought a worker back,
  // and goes on.
  constexpr int64_t kTokens = 400;
  const std::vector<Result> expected = Yardstick(4, kTokens);
  ScopedCluster cluster(LocalClusterOptions{});
  std::atomic<bool> done{false};
  std::vector<Result> results;
  std::thread load([&] {
    results = Concurrently(cluster, 4, kTokens);
    done = true;
  });
  bool killed = false;
  while (!done) {
    if (!killed) {
      for (const auto& [name, value] : Counters(cluster)) {
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
  for (int i = 0; i < 4; ++i) ExpectSame(results[i], expected[i], absl::StrCat("request ", i));
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
}

}  // namespace
}  // namespace moebius::services
