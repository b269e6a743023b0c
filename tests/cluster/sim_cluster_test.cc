// Clusters in simulation, thousands of them: whatever the delays, orders, placements, chunk sizes,
// company and faults, every stream's ids, logprobs and digests are the sequential oracle's.

#include "tests/cluster/sim_cluster.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "attention_worker/kv_block_pool.h"
#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::cluster_test {
namespace {

using attention_worker::BlocksForTokens;
using attention_worker::FinishReason;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr int kModels = 4;
constexpr int kRequestsPerModel = 24;

// Models and requests with the oracle's answers, computed once and shared by all seeds.
struct Case {
  std::unique_ptr<ToyModel> model;
  std::vector<OracleRequest> requests;
  std::vector<std::vector<OracleToken>> expected;
};

const Case& CaseOf(int index) {
  static std::vector<Case>* cases = [] {
    auto* made = new std::vector<Case>(kModels);
    const ToyModelOptions variants[kModels] = {
        {.seed = 11},
        {.fp8 = true, .layers = 4, .experts = 16, .seed = 12},
        {.fp8 = true,
         .hidden = 144,
         .experts = 8,
         .groups = 2,
         .topk_group = 1,
         .top_k = 3,
         .seed = 13},
        {.q_lora = false, .experts = 10, .groups = 1, .topk_group = 1, .top_k = 2, .seed = 14}};
    for (int m = 0; m < kModels; ++m) {
      Case& c = (*made)[m];
      c.model = std::make_unique<ToyModel>(variants[m]);
      const auto backend = MakeTestBackend();
      SequentialOracle oracle(c.model.get(), backend.get());
      Prng prng(1000 + m);
      for (int i = 0; i < kRequestsPerModel; ++i) {
        OracleRequest request;
        // Mostly short; some cross a border of cache blocks in the prompt, some while generating.
        const bool grows = i % 4 == 1;
        const uint64_t length = grows ? 50 + prng.Below(15) : 1 + prng.Below(i % 6 == 0 ? 140 : 40);
        for (uint64_t t = 0; t < length; ++t) {
          request.prompt.push_back(static_cast<TokenId>(prng.Below(192)));
        }
        request.max_tokens = 1 + prng.Below(grows ? 40 : 14);
        request.sampling.temperature = i % 2 == 0 ? 1.0f : 0.0f;
        request.sampling.seed = prng.Next();
        if (i % 3 == 0) request.eos_token_ids = {1};
        c.expected.push_back(oracle.Generate(request));
        c.requests.push_back(std::move(request));
      }
    }
    return made;
  }();
  return (*cases)[index];
}

// A cluster that the seed describes, with 2 to 7 concurrent requests.
struct SeededRun {
  explicit SeededRun(uint64_t seed) : prng(seed), c(CaseOf(static_cast<int>(seed % kModels))) {
    options.model = c.model.get();
    options.seed = seed;
    options.network.delay_max = microseconds(1 + prng.Below(500));
    options.network.delay_min =
        std::min<runtime::Duration>(microseconds(5), options.network.delay_max);
    options.network.compute_max = microseconds(10 + prng.Below(1000));
    options.network.stall_probability = prng.Below(3) == 0 ? 0.02 : 0.0;
    attention_worker::AttentionOptions& attention = options.attention;
    constexpr int32_t kChunks[] = {1, 2, 7, 16, 63, 64, 65, 512};
    attention.prefill_chunk = kChunks[prng.Below(8)];
    attention.max_running = 1 + static_cast<int32_t>(prng.Below(8));
    attention.max_step_tokens =
        std::min<int32_t>(512, attention.max_running +
                                   static_cast<int32_t>(prng.Below(2) == 0 ? prng.Below(30) : 504));
    attention.num_blocks = 3 + static_cast<int32_t>(prng.Below(5));
    attention.head_slice_rows = 1 + static_cast<int32_t>(prng.Below(4));
    attention.max_waiting = 16;
    options.router_on_own_node = prng.Below(2) == 0;
  }

  void Start() {
    cluster = std::make_unique<SimCluster>(options);
    const uint64_t count = 2 + prng.Below(6);
    for (uint64_t id = 1; id <= count; ++id) {
      const auto which = static_cast<size_t>(prng.Below(kRequestsPerModel));
      chosen[id] = which;
      cluster->Generate(id, c.requests[which], microseconds(prng.Below(20000)));
      if (prng.Below(6) == 0) cluster->Cancel(id, microseconds(prng.Below(60000)));
    }
  }

  void ExpectExact() {
    ASSERT_TRUE(cluster->RunToEnd(seconds(120))) << "requests never ended";
    for (const auto& [id, stream] : cluster->streams()) {
      ASSERT_TRUE(stream.orderly);
      ASSERT_NE(stream.finish, FinishReason::kError) << stream.status;
      std::vector<OracleToken> expected = c.expected[chosen[id]];
      if (stream.finish == FinishReason::kCancelled) {
        ++cancelled;
        ASSERT_LE(stream.tokens.size(), expected.size());
        expected.resize(stream.tokens.size());
      }
      ASSERT_EQ(stream.tokens, expected) << "request " << id << " (" << chosen[id] << ")";
      tokens += expected.size();
    }
    ASSERT_EQ(cluster->Imbalance(quiet), "");
    preemptions += cluster->counters().preemptions;
    resends += cluster->counters().route_resends;
  }

  Prng prng;
  const Case& c;
  SimClusterOptions options;
  std::unique_ptr<SimCluster> cluster;
  std::map<uint64_t, size_t> chosen;
  runtime::Duration quiet = milliseconds(500);
  static inline uint64_t tokens = 0, preemptions = 0, cancelled = 0, resends = 0;
};

void ExpectDiverseTokens() {
  // An oracle that always said the same would prove nothing.
  for (int m = 0; m < kModels; ++m) {
    std::map<TokenId, int> seen;
    for (const auto& tokens : CaseOf(m).expected) {
      for (const OracleToken& token : tokens) ++seen[token.token];
    }
    EXPECT_GT(seen.size(), 30u) << "model " << m;
  }
}

TEST(SimClusterTest, ThousandSeedsEqualTheOracle) {
  ExpectDiverseTokens();
  for (uint64_t seed = 1; seed <= 1000; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed);
    run.Start();
    run.ExpectExact();
    if (HasFatalFailure()) return;
  }
  RecordProperty("tokens", static_cast<int>(SeededRun::tokens));
  printf("tokens %lu, cancelled %lu, preemptions %lu\n", SeededRun::tokens, SeededRun::cancelled,
         SeededRun::preemptions);
  EXPECT_GT(SeededRun::tokens, 10000u);
  EXPECT_GT(SeededRun::cancelled, 100u);
  EXPECT_GT(SeededRun::preemptions, 20u);
}

TEST(SimClusterTest, BrokenLinksAndRouterRestartsChangeNothing) {
  SeededRun::resends = 0;
  for (uint64_t seed = 5001; seed <= 5150; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed);
    run.options.router_on_own_node = true;
    run.options.network.corrupt_probability = run.prng.Below(3) == 0 ? 0.002 : 0.0;
    run.options.network.silent_crash_probability = 0.2;
    run.quiet = seconds(8);  // a silent death is noticed after two seconds, a reconnect backs off
    run.Start();
    runtime::sim::SimWorld& world = run.cluster->world();
    for (int fault = 0; fault < 3; ++fault) {
      const runtime::Duration at = microseconds(run.prng.Below(60000));
      switch (run.prng.Below(3)) {
        case 0:
          world.Schedule(at, [&world] { world.Break(kAttentionNode, kRouterNode); });
          break;
        case 1:
          world.Schedule(at, [&world] {
            if (world.alive(kRouterNode)) world.Crash(kRouterNode);
          });
          world.Schedule(at + milliseconds(1 + run.prng.Below(300)), [&world] {
            if (!world.alive(kRouterNode)) world.Restart(kRouterNode);
          });
          break;
        default:
          world.Schedule(at, [&world] { world.Partition(kRouterNode, kAttentionNode); });
          world.Schedule(at + milliseconds(1 + run.prng.Below(4000)),
                         [&world] { world.HealAll(); });
      }
    }
    run.ExpectExact();
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(SeededRun::resends, 50u);
}

// Requests that together need twice the pool: what is taken back is computed again, to the bit.
TEST(SimClusterTest, HalfTheBlocksMeansPreemptionsNotOtherTokens) {
  const ToyModel model({.seed = 21});
  const auto backend = MakeTestBackend();
  SequentialOracle oracle(&model, backend.get());
  SimClusterOptions options;
  options.model = &model;
  options.attention.max_step_tokens = 128;
  options.attention.prefill_chunk = 32;
  options.attention.max_running = 64;
  std::vector<OracleRequest> requests;
  int64_t blocks_needed = 0;
  Prng prng(3);
  for (int i = 0; i < 64; ++i) {
    OracleRequest request;
    for (uint64_t t = 20 + prng.Below(40); t > 0; --t) {
      request.prompt.push_back(static_cast<TokenId>(prng.Below(192)));
    }
    request.max_tokens = 60 + prng.Below(30);
    request.sampling = {.temperature = i % 2 == 0 ? 1.0f : 0.0f, .seed = prng.Next()};
    blocks_needed +=
        BlocksForTokens(static_cast<int64_t>(request.prompt.size() + request.max_tokens) - 1);
    requests.push_back(request);
  }
  options.attention.num_blocks = static_cast<int32_t>(blocks_needed / 2);
  SimCluster cluster(options);
  for (size_t i = 0; i < requests.size(); ++i) cluster.Generate(i + 1, requests[i], {});
  uint64_t most_used = 0;
  ASSERT_TRUE(cluster.world().RunUntil(
      [&] {
        most_used = std::max(most_used, cluster.counters().blocks_used);
        return cluster.counters().requests == 64 && cluster.counters().running == 0 &&
               cluster.counters().waiting == 0;
      },
      seconds(600)));
  EXPECT_GE(cluster.counters().preemptions, 20u);
  EXPECT_LE(most_used, static_cast<uint64_t>(options.attention.num_blocks));
  for (size_t i = 0; i < requests.size(); ++i) {
    const ClientStream& stream = cluster.streams().at(i + 1);
    ASSERT_TRUE(stream.orderly);
    ASSERT_EQ(stream.finish, FinishReason::kLength);
    ASSERT_EQ(stream.tokens, oracle.Generate(requests[i])) << "request " << i;
  }
  EXPECT_EQ(cluster.Imbalance(milliseconds(500)), "");
}

TEST(SimClusterTest, DrainUnderLoadFinishesEverythingAboard) {
  for (uint64_t seed = 7001; seed <= 7020; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed);
    run.Start();
    bool drained = false;
    run.cluster->world().Schedule(milliseconds(25), [&] {
      ASSERT_TRUE(
          run.cluster->world()
              .node(kAttentionNode)
              .Post(runtime::kAttentionWorker, attention_worker::Drain{[&] { drained = true; }})
              .ok());
    });
    run.ExpectExact();
    ASSERT_TRUE(drained);
  }
}

TEST(SimClusterTest, TheSameSeedIsTheSameRun) {
  uint64_t traces[2];
  for (uint64_t& trace : traces) {
    SeededRun run(42);
    run.options.router_on_own_node = true;
    run.Start();
    run.ExpectExact();
    trace = run.cluster->world().trace_hash();
  }
  EXPECT_EQ(traces[0], traces[1]);
}

}  // namespace
}  // namespace moebius::cluster_test
