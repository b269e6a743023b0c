// All roles in one process on a real node: real clock, real compute threads, requests posted from
// several threads. The results are the oracle's; under ThreadSanitizer this is the race test of the
// actors' hand-over between loop and compute.

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "attention_worker/attention_actor.h"
#include "expert_worker/expert_actor.h"
#include "gtest/gtest.h"
#include "router/placement.h"
#include "router/router_actor.h"
#include "runtime/node.h"
#include "tests/cluster/scalar_backend.h"
#include "tests/cluster/sequential_oracle.h"
#include "tests/cluster/toy_model.h"

namespace moebius::cluster_test {
namespace {

using attention_worker::FinishReason;

class SteadyClock final : public runtime::Clock {
 public:
  runtime::TimePoint Now() const override {
    return {std::chrono::duration_cast<runtime::Duration>(
                std::chrono::steady_clock::now().time_since_epoch())
                .count()};
  }
};

// A transport without a network: it only sleeps and wakes.
class NoTransport final : public runtime::Transport {
 public:
  std::string ListenAddress() const override { return "none"; }
  runtime::ConnectionId Connect(const std::string&) override { return ++connections_; }
  runtime::SendResult Send(runtime::ConnectionId, runtime::Frame&) override {
    return runtime::SendResult::kUnreachable;
  }
  void Close(runtime::ConnectionId) override {}
  void Poll(std::vector<runtime::TransportEvent>&) override {}
  void Wait(runtime::Duration timeout) override {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait_for(lock, timeout, [this] { return woken_; });
    woken_ = false;
  }
  void Wake() override {
    std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
    wake_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  bool woken_ = false;
  runtime::ConnectionId connections_ = 0;
};

struct Answer {
  std::vector<OracleToken> tokens;
  bool ended = false;
};

void RunWithThreads(int compute_threads) {
  constexpr int kWorkers = 3;
  constexpr int kRequests = 12;
  const ToyModel model({.fp8 = true, .seed = 31});
  const model::ModelConfig& config = model.config();
  const auto new_backend = [] {
    return std::make_unique<ScalarBackend>(std::make_shared<DecodedWeights>());
  };
  std::vector<std::unique_ptr<ScalarBackend>> backends;
  for (int i = 0; i < kWorkers + 2; ++i) backends.push_back(new_backend());

  wire::RowLimits limits;
  limits.hidden = static_cast<uint32_t>(config.hidden_size);
  limits.layers = static_cast<uint32_t>(config.num_hidden_layers);
  limits.experts_per_layer = static_cast<uint32_t>(config.n_routed_experts);
  limits.top_k = static_cast<uint32_t>(config.num_experts_per_tok);
  limits.max_rows = 64;
  limits.e4m3 = true;

  SteadyClock clock;
  NoTransport transport;
  runtime::BufferPool pool({{4096, 64}, {64 * 1024, 32}});
  runtime::NodeOptions node_options;
  node_options.identity.node = NodeId(1);
  node_options.identity.incarnation = Incarnation(1);
  node_options.compute_threads = compute_threads;
  runtime::Node node(node_options, transport, clock, pool);

  attention_worker::AttentionOptions options;
  options.router = {NodeId(1), runtime::kRouter};
  options.max_step_tokens = 64;
  options.prefill_chunk = 16;
  options.max_running = 8;
  options.num_blocks = 12;
  auto attention = std::make_unique<attention_worker::AttentionActor>(
      attention_worker::AttentionModel{
          .config = &config, .weights = &model.weights(), .backend = backends[0].get()},
      options);
  const attention_worker::AttentionActor* attention_actor = attention.get();
  node.AddActor(runtime::kAttentionWorker, std::move(attention));

  router::RouterOptions router_options;
  router_options.limits = limits;
  router_options.gate = model.gate_config();
  for (const model::AttentionLayerWeights& layer : model.weights().layers) {
    router::GateWeights gate;
    if (layer.moe) gate = {layer.moe->gate, layer.moe->e_score_correction_bias.data()};
    router_options.layers.push_back(gate);
  }
  node.AddActor(runtime::kRouter,
                std::make_unique<router::RouterActor>(router_options, backends[1].get()));

  auto placement =
      std::make_shared<router::Placement>(Epoch(1), limits.layers, limits.experts_per_layer);
  for (int w = 0; w < kWorkers; ++w) {
    const ActorId id(static_cast<uint16_t>(runtime::kExpertWorker.value() + w));
    expert_worker::ExpertOptions expert_options;
    expert_options.limits = limits;
    expert_options.intermediate = config.moe_intermediate_size;
    node.AddActor(
        id, std::make_unique<expert_worker::ExpertActor>(expert_options, backends[w + 2].get()));
    expert_worker::HostExperts order;
    for (uint32_t l = 0; l < limits.layers; ++l) {
      if (!config.is_moe_layer(l)) continue;
      for (uint32_t e = static_cast<uint32_t>(w); e < limits.experts_per_layer; e += kWorkers) {
        const model::MlpWeights& mlp = model.expert(l, e);
        order.experts.push_back(
            {LayerId(l), ExpertId(e), {mlp.gate_proj, mlp.up_proj, mlp.down_proj}});
        placement->AddReplica(LayerId(l), ExpertId(e), {NodeId(1), id});
      }
    }
    ASSERT_TRUE(node.Post(id, order).ok());
  }
  ASSERT_TRUE(node.Post(runtime::kRouter, router::PlacementUpdate{placement}).ok());

  std::mutex mutex;
  std::condition_variable all_ended;
  int ended = 0;
  std::vector<Answer> answers(kRequests);
  std::vector<OracleRequest> requests(kRequests);
  for (int i = 0; i < kRequests; ++i) {
    Prng prng(100 + i);
    for (uint64_t t = 5 + prng.Below(70); t > 0; --t) {
      requests[i].prompt.push_back(static_cast<TokenId>(prng.Below(192)));
    }
    requests[i].max_tokens = 10 + prng.Below(20);
    requests[i].sampling = {.temperature = i % 2 == 0 ? 1.0f : 0.0f, .seed = prng.Next()};
  }
  std::thread loop([&node] { node.Run(); });
  std::vector<std::thread> clients;
  for (int c = 0; c < 3; ++c) {
    clients.emplace_back([&, c] {
      for (int i = c; i < kRequests; i += 3) {
        attention_worker::Submit submit;
        submit.request = RequestId(1 + i);
        submit.prompt = requests[i].prompt;
        submit.sampling = requests[i].sampling;
        submit.max_tokens = requests[i].max_tokens;
        submit.ignore_eos = true;
        submit.on_token = [&, i](const attention_worker::TokenEvent& event) {
          std::lock_guard<std::mutex> lock(mutex);
          if (event.token >= 0) {
            answers[i].tokens.push_back({event.token, event.logprob, event.row_digest});
          }
          if (event.finish_reason == FinishReason::kNone) return;
          answers[i].ended = true;
          ++ended;
          all_ended.notify_one();
        };
        EXPECT_TRUE(node.Post(runtime::kAttentionWorker, submit).ok());
        (void)attention_actor->counters();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  {
    std::unique_lock<std::mutex> lock(mutex);
    EXPECT_TRUE(
        all_ended.wait_for(lock, std::chrono::seconds(120), [&] { return ended == kRequests; }));
  }
  node.Stop();
  loop.join();
  EXPECT_EQ(attention_actor->counters().blocks_used, 0u);

  const auto oracle_backend = new_backend();
  SequentialOracle oracle(&model, oracle_backend.get());
  for (int i = 0; i < kRequests; ++i) {
    ASSERT_TRUE(answers[i].ended);
    ASSERT_EQ(answers[i].tokens, oracle.Generate(requests[i])) << "request " << i;
  }
}

TEST(ClusterThreadsTest, OneComputeThread) { RunWithThreads(1); }
TEST(ClusterThreadsTest, FourComputeThreads) { RunWithThreads(4); }

}  // namespace
}  // namespace moebius::cluster_test
