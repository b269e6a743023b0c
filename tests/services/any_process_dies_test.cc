// Goal: any one process may die at any moment: no request is lost, not one token differs, and the
// streams go on after a pause. Method: SIGKILL of each process in turn while streams run through
// the gateway, the supervisor brings it back; ids and row digests against one process.

#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "services/common/model_host.h"
#include "tests/services/process_cluster.h"

namespace moebius::services {
namespace {

constexpr int kStreams = 4;
constexpr int64_t kTokens = 450;

// Sends the process `signal` once every stream has begun; the streams' results.
std::vector<Result> SignalDuringStreams(ScopedCluster& cluster, const std::string& victim,
                                        int signal, bool supervised = true) {
  std::atomic<int> begun{0};
  std::vector<std::future<Result>> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.push_back(std::async(std::launch::async, [&, i] {
      const std::unique_ptr<GenerationClient> client = cluster.Client();
      return Generate(*client, MakeRequest(i, kTokens), [&](const v1::GenerateEvent& event) {
        // Not all at the same place.
        if (event.token_index() == static_cast<uint64_t>(10 + 17 * i)) ++begun;
      });
    }));
  }
  bool signalled = false;
  std::vector<Result> results;
  for (std::future<Result>& stream : streams) {
    while (stream.wait_for(std::chrono::milliseconds(5)) != std::future_status::ready) {
      if (!signalled && begun == kStreams) {
        EXPECT_EQ(kill(cluster.Pid(victim), signal), 0);
        signalled = true;
      }
      if (supervised) cluster->Supervise();
    }
    results.push_back(stream.get());
  }
  EXPECT_TRUE(signalled) << "the streams ended too early";
  return results;
}

TEST(AnyProcessDies, AndEveryStreamGoesOnToTheBit) {
  const std::vector<Result> expected = Yardstick(kStreams, kTokens);
  LocalClusterOptions options;
  options.attention = 2;
  ScopedCluster cluster(options);
  for (const char* victim :
       {"gateway", "attention-0", "attention-1", "expert-0", "expert-1", "controller"}) {
    const std::vector<Result> results = SignalDuringStreams(cluster, victim, SIGKILL);
    std::chrono::steady_clock::duration longest{};
    for (int i = 0; i < kStreams; ++i) {
      ExpectSame(results[i], expected[i], absl::StrCat(victim, " killed, stream ", i));
      longest = std::max(longest, results[i].longest_pause);
    }
    std::printf("%s killed: the longest pause of %d streams was %.0f ms\n", victim, kStreams,
                std::chrono::duration<double, std::milli>(longest).count());
    if (HasFailure()) return;
    // All six are there again before the next one goes.
    AwaitCounters(cluster->address(), [](const auto& counters) {
      const auto of = [&](const char* name) {
        const auto it = counters.find(name);
        return it == counters.end() ? uint64_t{0} : it->second;
      };
      return of("ready") == 1 && of("attention_workers_ready") == 2 &&
             of("expert_workers_ready") == 2 && of("controller_settled") == 1;
    });
  }
  const auto counters = cluster.Counters();
  EXPECT_GE(counters.at("requests_replayed"), 2u) << "both attention workers had streams";
  EXPECT_EQ(counters.at("requests_inexact"), 0u);
  EXPECT_EQ(SumOf(counters, "/exactness_mismatch_total"), 0u);
}

// With a single attention worker its streams wait for its next incarnation.
TEST(AnyProcessDies, TheOnlyAttentionWorkerToo) {
  const std::vector<Result> expected = Yardstick(kStreams, kTokens);
  ScopedCluster cluster(LocalClusterOptions{});
  const std::vector<Result> results = SignalDuringStreams(cluster, "attention-0", SIGKILL);
  for (int i = 0; i < kStreams; ++i) {
    ExpectSame(results[i], expected[i], absl::StrCat("stream ", i));
    std::printf("stream %d paused for %.0f ms\n", i,
                std::chrono::duration<double, std::milli>(results[i].longest_pause).count());
  }
}

// A score is made again from its beginning, by another worker or through the next gateway.
TEST(AnyProcessDies, AScoreSurvivesItsAttentionWorkerAndItsGateway) {
  v1::ScoreRequest request;
  for (int32_t i = 0; i < 2000; ++i) request.mutable_token_ids()->add_ids(3 + i * 7 % 4000);
  request.set_top(2);
  const auto expected = OneProcess()->Score(request);
  ASSERT_TRUE(expected.ok()) << expected.status();
  LocalClusterOptions options;
  options.attention = 2;
  ScopedCluster cluster(options);
  for (const bool gateway : {false, true}) {
    auto score = std::async(std::launch::async, [&] { return cluster.Client()->Score(request); });
    const auto counters = AwaitCounters(cluster->address(),
                                        [](const auto& now) { return SumOf(now, "/running") > 0; });
    // Whoever has it aboard dies, or who waits for it.
    std::string victim = "gateway";
    for (const char* name : {"attention-0", "attention-1"}) {
      const auto running = counters.find(absl::StrCat("attention/", NodeIdOf(name), "/running"));
      if (!gateway && running != counters.end() && running->second > 0) victim = name;
    }
    EXPECT_EQ(victim == "gateway", gateway);
    EXPECT_EQ(kill(cluster.Pid(victim), SIGKILL), 0);
    while (score.wait_for(std::chrono::milliseconds(5)) != std::future_status::ready) {
      cluster->Supervise();
    }
    const auto reply = score.get();
    ASSERT_TRUE(reply.ok()) << victim << ": " << reply.status();
    ASSERT_EQ(reply->positions_size(), expected->positions_size());
    for (int i = 0; i < reply->positions_size(); ++i) {
      EXPECT_EQ(reply->positions(i).row_digest(), expected->positions(i).row_digest());
    }
  }
}

// With two replicas of each expert nobody waits for a dead worker to come back: here it never does.
// Once its lease has lapsed the others hold two replicas again, and the next one may die.
TEST(AnyProcessDies, WithReplicasExpertWorkersAreNotMissed) {
  const std::vector<Result> expected = Yardstick(kStreams, kTokens);
  LocalClusterOptions options;
  options.experts = 3;
  options.replicas = 2;
  ScopedCluster cluster(options);
  for (const char* victim : {"expert-1", "expert-2"}) {
    const uint64_t epoch = cluster.Counters()["placement_epoch"];
    const std::vector<Result> results =
        SignalDuringStreams(cluster, victim, SIGKILL, /*supervised=*/false);
    std::chrono::steady_clock::duration longest{};
    for (int i = 0; i < kStreams; ++i) {
      ExpectSame(results[i], expected[i], absl::StrCat(victim, " killed, stream ", i));
      longest = std::max(longest, results[i].longest_pause);
    }
    std::printf("%s killed, replicas: the longest pause of %d streams was %.0f ms\n", victim,
                kStreams, std::chrono::duration<double, std::milli>(longest).count());
    // New requests are served all the time.
    bool placed = false;
    for (int request = 0; !placed && !HasFailure(); ++request) {
      const auto counters = cluster.Counters();
      EXPECT_EQ(counters.at("ready"), 1u);
      placed = counters.at("placement_epoch") > epoch;
      ExpectSame(Generate(*cluster.Client(), MakeRequest(1, 24)), Yardstick(2)[1], "meanwhile");
      ASSERT_LT(request, 1000) << "the others never got the dead one's experts";
    }
    if (HasFailure()) return;
  }
}

// One that hangs closes no connection: its beats stop. When it goes on, nobody listens to it.
TEST(AnyProcessDies, AnAttentionWorkerThatHangsIsReplaced) {
  const std::vector<Result> expected = Yardstick(kStreams, kTokens);
  LocalClusterOptions options;
  options.attention = 2;
  options.role_flags = {{"gateway", {"--worker-silence-ms", "500"}}};
  ScopedCluster cluster(options);
  const std::vector<Result> results = SignalDuringStreams(cluster, "attention-0", SIGSTOP);
  kill(cluster.Pid("attention-0"), SIGCONT);
  for (int i = 0; i < kStreams; ++i) {
    ExpectSame(results[i], expected[i], absl::StrCat("stream ", i));
  }
  EXPECT_GE(cluster.Counters().at("workers_silent"), 1u);
  EXPECT_EQ(cluster.Counters().at("in_flight"), 0u);
  // It is as good as the other one again, and holds nothing of what it had.
  AwaitCounters(cluster->address(), [](const auto& counters) {
    return counters.at("attention_workers_ready") == 2 && SumOf(counters, "/blocks_used") == 0 &&
           SumOf(counters, "/running") == 0;
  });
  const std::vector<Result> again = Concurrently(cluster->address(), kStreams, kTokens);
  for (int i = 0; i < kStreams; ++i) {
    ExpectSame(again[i], expected[i], absl::StrCat("afterwards, stream ", i));
  }
}

}  // namespace
}  // namespace moebius::services
