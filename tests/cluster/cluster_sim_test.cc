// Clusters in simulation, thousands of them: whatever the delays, orders, placements, chunk sizes,
// company and faults, every stream's ids, logprobs and digests are the sequential oracle's.

#include "tests/cluster/cluster_sim.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "attention_worker/kv_block_pool.h"
#include "base/check.h"
#include "base/prng.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

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

std::vector<Case>* MakeCases(
    const std::function<std::unique_ptr<kernels::Backend>()>& new_backend) {
  auto* made = new std::vector<Case>(kModels);
  const ToyModelOptions variants[kModels] = {
      {.seed = 11},
      {.fp8 = true, .layers = 4, .experts = 16, .seed = 12},
      {.fp8 = true,
       .power_of_two_scales = true,
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
    const auto backend = new_backend();
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
}

const Case& CaseOf(int index) {
  static const std::vector<Case>* cases = MakeCases(MakeTestBackend);
  return (*cases)[index];
}

// The CPU kernels, by default in their plainest setting: one thread, portable code.
std::unique_ptr<kernels::Backend> NewCpuBackend(const kernels::cpu::CpuBackendOptions& options = {
                                                    .num_threads = 1,
                                                    .target = kernels::cpu::CpuTarget::kPortable}) {
  auto backend = kernels::cpu::CpuBackend::Create(options);
  CHECK(backend.ok());
  return *std::move(backend);
}

const Case& CpuCaseOf(int index) {
  static const std::vector<Case>* cases = MakeCases([] { return NewCpuBackend(); });
  return (*cases)[index];
}

// The seeds of one test: `count` of them by default; `./dev sim SEEDS FIRST_SEED` takes more, from
// elsewhere, in the same proportions.
struct Seeds {
  uint64_t first, last;
  uint64_t count() const { return last - first + 1; }
};
Seeds SeedsOf(uint64_t test, uint64_t count) {
  const auto number = [](const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    uint64_t value = 0;
    return text != nullptr && absl::SimpleAtoi(text, &value) ? value : otherwise;
  };
  const uint64_t scaled = std::max<uint64_t>(number("MOEBIUS_SIM_SEEDS", 1000) * count / 1000, 1);
  // Tests do not share seeds: each has a million million of its own.
  const uint64_t first = test * 1'000'000'000'000 + number("MOEBIUS_SIM_FIRST_SEED", 1);
  return {first, first + scaled - 1};
}

// A cluster that the seed describes, with 2 to 7 concurrent requests.
struct SeededRun {
  explicit SeededRun(uint64_t seed) : SeededRun(seed, CaseOf(static_cast<int>(seed % kModels))) {}
  // `workers`: 0 lets the seed choose.
  SeededRun(uint64_t seed, const Case& which, int workers = 0) : prng(seed), c(which) {
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
    constexpr int kWorkers[] = {1, 2, 3, 3, 3, 3, 5};
    options.expert_workers = kWorkers[prng.Below(7)];
    if (workers != 0) options.expert_workers = workers;
    options.experts_in_attention_node = !options.router_on_own_node && prng.Below(4) == 0;
    options.max_rows_per_frame = 32 + static_cast<uint32_t>(prng.Below(33));
    options.hosts = MakeHosts(*c.model, options.expert_workers, /*replicas=*/1 + prng.Below(4) / 3,
                              /*scrambled=*/prng.Below(2) == 0, prng);
  }

  void Start() {
    cluster = std::make_unique<ClusterSim>(options);
    const uint64_t count = 2 + prng.Below(6);
    for (uint64_t id = 1; id <= count; ++id) {
      const auto which = static_cast<size_t>(prng.Below(kRequestsPerModel));
      chosen[id] = which;
      cluster->Generate(id, c.requests[which], microseconds(prng.Below(20000)));
      if (prng.Below(6) == 0) cluster->Cancel(id, microseconds(prng.Below(60000)));
    }
  }

  std::string Describe() {
    const auto& router = *cluster->router_counters();
    const attention_worker::AttentionCounters counts = cluster->counters();
    std::string out = absl::StrCat(
        "workers ", options.expert_workers, options.experts_in_attention_node ? " local" : "",
        options.router_on_own_node ? ", router apart" : "", ", steps ", counts.steps, ", running ",
        counts.running, ", route requests ", counts.route_requests, ", resends ",
        counts.route_resends, ", rejected ", counts.route_rejected, "; router rounds ",
        router.rounds.load(), ", sent ", router.items_sent.load(), ", resent ",
        router.items_resent.load(), ", refused ", router.refused_frames.load(), ", without holder ",
        router.rows_without_holder.load(), ", stale ", router.stale_answers.load());
    for (const NodeId id : cluster->nodes()) {
      if (!cluster->world().alive(id)) continue;
      absl::StrAppend(&out, "; node ", id.value(), " buffers ", cluster->world().pool(id).in_use(),
                      " frames ", cluster->world().node(id).outstanding_frames());
    }
    return out;
  }

  void ExpectExact() {
    ASSERT_TRUE(cluster->RunToEnd(seconds(120))) << "requests never ended: " << Describe();
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
    ASSERT_EQ(cluster->router_counters()->exactness_mismatches, 0u);
    const std::vector<uint64_t> served = cluster->items_served();
    for (const uint64_t items : served) {
      pairs += items;
      idle_workers += items == 0;
    }
    workers += served.size();
  }

  Prng prng;
  const Case& c;
  ClusterSimOptions options;
  std::unique_ptr<ClusterSim> cluster;
  std::map<uint64_t, size_t> chosen;
  runtime::Duration quiet = milliseconds(500);
  static inline uint64_t tokens = 0, preemptions = 0, cancelled = 0, resends = 0, pairs = 0,
                         workers = 0, idle_workers = 0;
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

// One attention worker and three expert workers that serve with the CPU kernels; beside what every
// SeededRun varies, each worker has a thread count of its own and one of the targets (the portable
// one, much slower, now and then).
TEST(ClusterSimTest, ThousandSeedsEqualTheOracle) {
  ExpectDiverseTokens();
  const Seeds seeds = SeedsOf(0, 1000);
  const std::vector<kernels::cpu::CpuTarget> targets = kernels::cpu::SupportedTargets();
  for (uint64_t seed = seeds.first; seed <= seeds.last; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed, CpuCaseOf(static_cast<int>(seed % kModels)), /*workers=*/3);
    Prng choice(seed);
    run.options.new_backend = [&] {
      // targets[0] is the portable one.
      const size_t vectors = targets.size() - 1;
      const size_t target = vectors == 0 || choice.Below(100) == 0 ? 0 : 1 + choice.Below(vectors);
      return NewCpuBackend({.num_threads = 1 + static_cast<int>(choice.Below(4)),
                            .target = targets[target],
                            .min_parallel_work = 1 + static_cast<int64_t>(choice.Below(4000))});
    };
    run.Start();
    run.ExpectExact();
    if (HasFatalFailure()) return;
  }
  RecordProperty("tokens", static_cast<int>(SeededRun::tokens));
  printf("tokens %lu, cancelled %lu, preemptions %lu, pairs %lu, workers %lu of which idle %lu\n",
         SeededRun::tokens, SeededRun::cancelled, SeededRun::preemptions, SeededRun::pairs,
         SeededRun::workers, SeededRun::idle_workers);
  // The seeds do exercise what they are meant to.
  EXPECT_GE(SeededRun::tokens, 10 * seeds.count());
  EXPECT_GE(SeededRun::cancelled, seeds.count() / 10);
  EXPECT_GE(SeededRun::preemptions, seeds.count() / 50);
}

TEST(ClusterSimTest, BrokenLinksAndRouterRestartsChangeNothing) {
  SeededRun::resends = 0;
  const Seeds seeds = SeedsOf(1, 150);
  for (uint64_t seed = seeds.first; seed <= seeds.last; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed);
    run.options.router_on_own_node = true;
    run.options.experts_in_attention_node = false;
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
  EXPECT_GE(SeededRun::resends, seeds.count() / 3);
}

// Expert workers crash (with notice or silently), come back, are cut off; experts have one holder
// or two. No request is lost and no bit differs; while an expert has no holder its rows wait.
TEST(ClusterSimTest, ExpertCrashesRestartsAndPartitionsChangeNothing) {
  uint64_t resent = 0, hedged = 0;
  const Seeds seeds = SeedsOf(2, 200);
  for (uint64_t seed = seeds.first; seed <= seeds.last; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed);
    run.options.experts_in_attention_node = false;
    run.options.expert_workers = 3;
    run.options.hosts = MakeHosts(*run.c.model, 3, 1 + static_cast<int>(run.prng.Below(2)),
                                  run.prng.Below(2) == 0, run.prng);
    run.options.network.silent_crash_probability = 0.3;
    run.quiet = seconds(8);
    run.Start();
    runtime::sim::SimWorld& world = run.cluster->world();
    const NodeId router = run.options.router_on_own_node ? kRouterNode : kAttentionNode;
    for (int fault = 0; fault < 4; ++fault) {
      const runtime::Duration at = microseconds(run.prng.Below(80000));
      const NodeId expert = ExpertNode(static_cast<int>(run.prng.Below(3)));
      switch (run.prng.Below(4)) {
        case 0:
          world.Schedule(at, [&world, expert, router] { world.Break(expert, router); });
          break;
        case 1:
          world.Schedule(at, [&world, expert, router] { world.Partition(expert, router); });
          world.Schedule(at + milliseconds(1 + run.prng.Below(4000)),
                         [&world] { world.HealAll(); });
          break;
        default:
          world.Schedule(at, [&world, expert] {
            if (world.alive(expert)) world.Crash(expert);
          });
          world.Schedule(at + milliseconds(1 + run.prng.Below(1000)), [&world, expert] {
            if (!world.alive(expert)) world.Restart(expert);
          });
      }
    }
    run.ExpectExact();
    if (HasFatalFailure()) return;
    resent += run.cluster->router_counters()->items_resent;
    hedged += run.cluster->router_counters()->items_hedged;
  }
  EXPECT_GE(resent, seeds.count() / 2);
  EXPECT_GE(hedged, seeds.count() / 20);
}

// Attention workers crash, one of two or the only one, while expert workers and links fail as well.
// The gateway's journal takes each stream to the other one, or to the next incarnation: no request
// is lost, no token is repeated, left out or another one, wherever the stream was cut.
TEST(ClusterSimTest, AttentionCrashesChangeNothing) {
  uint64_t replays = 0, cuts = 0;
  const Seeds seeds = SeedsOf(5, 300);
  for (uint64_t seed = seeds.first; seed <= seeds.last; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed);
    run.options.attention_workers = 1 + static_cast<int>(run.prng.Below(2));
    run.options.experts_in_attention_node = false;
    run.options.network.silent_crash_probability = 0.2;
    run.quiet = seconds(8);
    run.Start();
    runtime::sim::SimWorld& world = run.cluster->world();
    const std::vector<NodeId> attention = run.cluster->AttentionNodes();
    int deaths = 0;  // a third without a new token in between would be held against the request
    for (int fault = 0; fault < 4; ++fault) {
      const runtime::Duration at = microseconds(run.prng.Below(80000));
      const NodeId expert =
          ExpertNode(static_cast<int>(run.prng.Below(run.options.expert_workers)));
      const NodeId node = attention[run.prng.Below(attention.size())];
      switch (deaths == 2 ? run.prng.Below(2) : run.prng.Below(6)) {
        case 0:
          world.Schedule(at, [&world, expert, node] { world.Break(expert, node); });
          break;
        case 1:
          world.Schedule(at, [&world, expert] {
            if (world.alive(expert)) world.Crash(expert);
          });
          world.Schedule(at + milliseconds(1 + run.prng.Below(500)), [&world, expert] {
            if (!world.alive(expert)) world.Restart(expert);
          });
          break;
        default:
          ++deaths;
          run.cluster->CrashAttention(node, at, milliseconds(1 + run.prng.Below(200)));
      }
    }
    run.ExpectExact();
    if (HasFatalFailure()) return;
    replays += run.cluster->replays();
    for (const auto& [id, stream] : run.cluster->streams()) {
      cuts += stream.journal.attempts() > 1 && !stream.tokens.empty();
    }
  }
  printf("%lu replays of %lu streams that had begun\n", replays, cuts);
  EXPECT_GE(replays, seeds.count());
  EXPECT_GE(cuts, seeds.count() / 2);
}

// A request whose company is deadly: after three deaths it fails by itself, and all the others,
// which died with it each time, are as if nothing had been.
TEST(ClusterSimTest, ARequestThatKillsItsWorkerFailsAlone) {
  const Seeds seeds = SeedsOf(6, 100);
  for (uint64_t seed = seeds.first; seed <= seeds.last; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed);
    run.options.attention_workers = 1 + static_cast<int>(run.prng.Below(2));
    run.options.experts_in_attention_node = false;
    run.quiet = seconds(8);
    run.Start();
    // Before its first token, which takes a step of three layers and more at least; now and then
    // the worker dies before it has seen the request.
    run.cluster->Poison(1, microseconds(run.prng.Below(60)));
    ASSERT_TRUE(run.cluster->RunToEnd(seconds(120))) << run.Describe();
    for (const auto& [id, stream] : run.cluster->streams()) {
      ASSERT_TRUE(stream.orderly);
      if (stream.finish == FinishReason::kCancelled) continue;
      if (id == 1) {
        ASSERT_EQ(stream.finish, FinishReason::kError);
        ASSERT_EQ(stream.status.code(), absl::StatusCode::kInternal) << stream.status;
        ASSERT_TRUE(stream.tokens.empty());
        continue;
      }
      ASSERT_NE(stream.finish, FinishReason::kError) << "request " << id << ": " << stream.status;
      ASSERT_EQ(stream.tokens, run.c.expected[run.chosen[id]]) << "request " << id;
    }
  }
}

// Experts move between workers while requests run; workers may drop a shard before its rows in
// flight have arrived (NOT_HOSTED).
TEST(ClusterSimTest, MovingExpertsChangesNothing) {
  uint64_t resent = 0;
  const Seeds seeds = SeedsOf(3, 100);
  for (uint64_t seed = seeds.first; seed <= seeds.last; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    SeededRun run(seed);
    run.Start();
    for (int move = 0; move < 4; ++move) {
      run.cluster->Move(
          MakeHosts(*run.c.model, run.options.expert_workers,
                    1 + static_cast<int>(run.prng.Below(2)), run.prng.Below(2) == 0, run.prng),
          /*dropping=*/run.prng.Below(2) == 0, microseconds(1000 + run.prng.Below(60000)));
    }
    run.ExpectExact();
    if (HasFatalFailure()) return;
    resent += run.cluster->router_counters()->items_resent;
  }
  EXPECT_GT(resent, 0u);
}

// Requests that together need twice the pool: what is taken back is computed again, to the bit.
TEST(ClusterSimTest, HalfTheBlocksMeansPreemptionsNotOtherTokens) {
  const ToyModel model({.seed = 21});
  const auto backend = MakeTestBackend();
  SequentialOracle oracle(&model, backend.get());
  ClusterSimOptions options;
  options.model = &model;
  options.attention.max_step_tokens = 128;
  options.attention.prefill_chunk = 32;
  options.attention.max_running = 64;
  options.expert_workers = 3;
  std::vector<OracleRequest> requests;
  int64_t blocks_needed = 0;
  Prng prng(3);
  options.hosts = MakeHosts(model, 3, 1, true, prng);
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
  ClusterSim cluster(options);
  for (size_t i = 0; i < requests.size(); ++i) cluster.Generate(i + 1, requests[i], {});
  uint64_t most_used = 0;
  ASSERT_TRUE(cluster.world().RunUntil(
      [&] {
        most_used = std::max(most_used, cluster.counters().blocks_used);
        return cluster.counters().requests == 64 && cluster.counters().running == 0 &&
               cluster.counters().waiting == 0;
      },
      seconds(600)));
  ASSERT_TRUE(cluster.RunToEnd(seconds(1)));  // the last events are on their way
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

TEST(ClusterSimTest, DrainUnderLoadFinishesEverythingAboard) {
  const Seeds seeds = SeedsOf(4, 20);
  for (uint64_t seed = seeds.first; seed <= seeds.last; ++seed) {
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

// The kernels that serve: every actor with its own number of threads and instruction set, against
// one thread of the portable code.
// Event by event and byte by byte: what buffers held before (here two different fills) reaches no
// frame.
TEST(ClusterSimTest, TheSameSeedIsTheSameRun) {
  for (int c = 0; c < kModels; ++c) {
    uint64_t traces[2];
    for (int i = 0; i < 2; ++i) {
      SeededRun run(42, CaseOf(c));
      run.options.router_on_own_node = true;
      run.options.experts_in_attention_node = false;
      run.options.network.buffer_fill = i == 0 ? std::byte{0x00} : std::byte{0xff};
      run.Start();
      run.ExpectExact();
      traces[i] = run.cluster->world().trace_hash();
    }
    EXPECT_EQ(traces[0], traces[1]) << "model " << c;
  }
}

}  // namespace
}  // namespace moebius::cluster_test
