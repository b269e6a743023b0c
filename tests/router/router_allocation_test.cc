// Goal: after warm-up a routed step allocates nothing: node, router, expert workers, frames and
// buffers. Method: one node with a router and two expert workers, compute inline on a clock of our
// own, a requester that reuses pool buffers, and operator new counted.

#include <string>

#include "base/check.h"
#include "base/prng.h"
#include "expert_worker/expert_actor.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "router/router_actor.h"
#include "runtime/local_transport.h"
#include "runtime/node.h"
#include "tests/allocation_counter.h"

namespace moebius::router {
namespace {

constexpr uint32_t kHidden = 128;
constexpr uint32_t kInter = 64;
constexpr uint32_t kExperts = 8;
constexpr uint32_t kTopK = 2;
constexpr uint32_t kRows = 32;

class ManualClock final : public runtime::Clock {
 public:
  runtime::TimePoint Now() const override { return now; }
  runtime::TimePoint now{1'000'000};
};

// Sends a request of `rows` rows when it is told to, and drops the answer.
class Requester final : public runtime::Actor {
 public:
  explicit Requester(uint64_t& answers) : answers_(answers) {}
  void Receive(runtime::Message message, runtime::Context& context) override {
    if (auto* received = std::get_if<runtime::FrameReceived>(&message)) {
      ++answers_;
      received->frame.payload = runtime::Buffer();
      Ask(context);
    } else if (std::get_if<runtime::Posted>(&message) != nullptr) {
      Ask(context);
    }
  }

 private:
  void Ask(runtime::Context& context) {
    const uint32_t rows = 1 + static_cast<uint32_t>(prng_.Below(kRows));
    std::optional<runtime::Buffer> buffer = context.AcquireBuffer(rows * kHidden * sizeof(Bf16));
    CHECK(buffer.has_value());
    auto* values = reinterpret_cast<Bf16*>(buffer->data());
    for (uint32_t i = 0; i < rows * kHidden; ++i) values[i] = ToBf16(prng_.Unit() - 0.5f);
    runtime::Frame frame;
    frame.header.type = static_cast<uint16_t>(wire::FrameType::kRouteRequest);
    frame.header.step = ++step_;
    frame.header.layer = 1;
    frame.header.row_count = rows;
    frame.header.row_bytes = kHidden * sizeof(Bf16);
    frame.header.correlation = step_;
    frame.payload = std::move(*buffer);
    CHECK(context.Send({context.Self().node, runtime::kRouter}, frame) ==
          runtime::SendResult::kSent);
  }
  uint64_t& answers_;
  uint64_t step_ = 0;
  Prng prng_{5};
};

std::vector<Bf16> RandomMatrix(size_t count, uint64_t seed) {
  Prng prng(seed);
  std::vector<Bf16> values(count);
  for (Bf16& value : values) value = ToBf16((prng.Unit() - 0.5f) * 0.3f);
  return values;
}

// BF16 values, or e4m3 codes in the same bytes with the same scale for every block.
MatrixView View(const std::vector<Bf16>& values, int64_t rows, int64_t cols, bool e4m3 = false) {
  MatrixView view;
  static constexpr float kScales[16] = {0.01f, 0.01f, 0.01f, 0.01f, 0.01f, 0.01f, 0.01f, 0.01f,
                                        0.01f, 0.01f, 0.01f, 0.01f, 0.01f, 0.01f, 0.01f, 0.01f};
  view.dtype = e4m3 ? DType::kE4m3 : DType::kBf16;
  if (e4m3) view.scale_inv = kScales;
  view.rows = rows;
  view.cols = cols;
  view.data = reinterpret_cast<const std::byte*>(values.data());
  return view;
}

// Rows on the wire in BF16, or quantised by the router and again by the expert workers.
class RouterAllocation : public testing::TestWithParam<bool> {};

TEST_P(RouterAllocation, ARoutedStepAllocatesNothingAfterWarmUp) {
  const bool e4m3 = GetParam();
  const auto backend = [] {
    auto created = kernels::cpu::CpuBackend::Create({.num_threads = 1});
    CHECK(created.ok());
    return *std::move(created);
  };
  const auto router_backend = backend();
  const auto first = backend();
  const auto second = backend();
  const std::vector<Bf16> gate = RandomMatrix(kExperts * kHidden, 1);
  const std::vector<Bf16> up = RandomMatrix(kInter * kHidden, 2);
  const std::vector<Bf16> down = RandomMatrix(kHidden * kInter, 3);

  RouterOptions options;
  options.limits = {kHidden, 2, kExperts, kTopK, kRows, e4m3};
  options.gate.n_routed_experts = kExperts;
  options.gate.num_experts_per_tok = kTopK;
  options.gate.topk_method = kernels::TopkMethod::kGreedy;
  options.layers.resize(2);
  options.layers[1].gate = View(gate, kExperts, kHidden);
  expert_worker::ExpertOptions expert_options;
  expert_options.limits = options.limits;
  expert_options.intermediate = kInter;

  ManualClock clock;
  runtime::BufferPool pool({{4096, 64}, {1 << 16, 64}});
  runtime::LocalTransport transport;
  uint64_t answers = 0;
  runtime::NodeOptions node_options;
  node_options.identity.node = NodeId(1);
  node_options.identity.incarnation = Incarnation(1);
  node_options.simulated_compute_delay = [] { return runtime::Duration(1000); };
  runtime::Node node(node_options, transport, clock, pool);
  auto router = std::make_unique<RouterActor>(options, router_backend.get());
  const std::shared_ptr<const RouterCounters> counters = router->counters();
  node.AddActor(runtime::kRouter, std::move(router));
  const ActorId workers[2] = {runtime::kExpertWorker, ActorId(runtime::kExpertWorker.value() + 1)};
  node.AddActor(workers[0],
                std::make_unique<expert_worker::ExpertActor>(expert_options, first.get()));
  node.AddActor(workers[1],
                std::make_unique<expert_worker::ExpertActor>(expert_options, second.get()));
  node.AddActor(runtime::kFirstTestActor, std::make_unique<Requester>(answers));
  auto placement = std::make_shared<Placement>(Epoch(1), 2, kExperts);
  for (uint32_t worker = 0; worker < 2; ++worker) {
    expert_worker::HostExperts order;
    for (uint32_t expert = worker; expert < kExperts; expert += 2) {
      order.experts.push_back({LayerId(1),
                               ExpertId(expert),
                               {View(up, kInter, kHidden, e4m3), View(up, kInter, kHidden, e4m3),
                                View(down, kHidden, kInter, e4m3)}});
      placement->AddReplica(LayerId(1), ExpertId(expert), {NodeId(1), workers[worker]});
    }
    ASSERT_TRUE(node.Post(workers[worker], std::move(order)).ok());
  }
  ASSERT_TRUE(node.Post(runtime::kRouter, PlacementUpdate{placement}).ok());
  ASSERT_TRUE(node.Post(runtime::kFirstTestActor, 0).ok());

  const auto run_until = [&](uint64_t wanted) {
    for (int turn = 0; turn < 1'000'000 && answers < wanted; ++turn) {
      node.RunOnce();
      clock.now = clock.now + runtime::Duration(1000);
    }
    return answers >= wanted;
  };
  ASSERT_TRUE(run_until(200));  // warm-up: every shape and every vector has grown
  const int64_t before = testing_support::allocations.load();
  const bool done = run_until(700);
  const int64_t after = testing_support::allocations.load();
  ASSERT_TRUE(done);
  EXPECT_EQ(after - before, 0);
  EXPECT_GE(counters->rounds.load(), 700u);
  EXPECT_EQ(counters->stale_answers.load(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Wire, RouterAllocation, testing::Bool(), [](const auto& e4m3) {
  return std::string(e4m3.param ? "E4m3" : "Bf16");
});

}  // namespace
}  // namespace moebius::router
