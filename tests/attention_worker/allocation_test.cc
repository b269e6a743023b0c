// A step allocates nothing once everything has been used: operator new is replaced by one that
// counts while the actor's own code runs (its Receive and its compute work, the test's network and
// clock excepted).

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "attention_worker/attention_actor.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/attention_worker/fake_node.h"
#include "tests/attention_worker/fake_router.h"
#include "tests/cluster/sequential_oracle.h"
#include "tests/cluster/test_backend.h"
#include "tests/cluster/toy_model.h"

namespace {
bool counting = false;
uint64_t allocations = 0;

void* CountedAllocation(size_t size, size_t alignment) {
  if (counting) ++allocations;
  void* memory =
      alignment <= alignof(std::max_align_t)
          ? std::malloc(size == 0 ? 1 : size)
          : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (memory == nullptr) std::abort();
  return memory;
}
}  // namespace

void* operator new(size_t size) { return CountedAllocation(size, 1); }
void* operator new[](size_t size) { return CountedAllocation(size, 1); }
void* operator new(size_t size, std::align_val_t alignment) {
  return CountedAllocation(size, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace moebius::attention_worker {
namespace {

void ExpectNoAllocations(std::unique_ptr<kernels::Backend> backend) {
  allocations = 0;
  // Not freed: the test backends keep decoded weights by address.
  static const auto& model = *new cluster_test::ToyModel({});
  auto oracle_backend = cluster_test::MakeTestBackend();
  cluster_test::SequentialOracle oracle(&model, oracle_backend.get());
  AttentionOptions options;
  options.router = {NodeId(1), runtime::kRouter};
  options.num_blocks = 8;
  options.max_step_tokens = 48;
  options.prefill_chunk = 16;
  options.max_running = 8;
  options.max_waiting = 16;
  options.head_slice_rows = 4;
  AttentionActor actor(
      {.config = &model.config(), .weights = &model.weights(), .backend = backend.get()}, options);
  FakeNode node(1, std::chrono::milliseconds(1));
  FakeRouter router(&node, &oracle, model.config().hidden_size, std::chrono::milliseconds(1), {});
  node.Host(&actor);

  uint64_t tokens = 0, scores = 0;
  auto post_all = [&](uint64_t first_id) {
    for (uint64_t id = first_id; id < first_id + 6; ++id) {
      Submit submit;
      submit.request = RequestId(id);
      submit.prompt.assign(50, static_cast<TokenId>(2 + id % 100));
      submit.max_tokens = 80;
      submit.ignore_eos = true;
      submit.sampling = {.temperature = id % 2 == 0 ? 1.0f : 0.0f, .seed = id};
      submit.on_token = [&tokens](const TokenEvent&) { ++tokens; };
      if (id % 6 == 5) {
        submit.max_tokens = 0;
        submit.top_n = 4;
        submit.on_score = [&scores](const ScoreEvent&) { ++scores; };
      }
      node.Post(std::move(submit));
    }
    for (int i = 0; i < 6; ++i) ASSERT_TRUE(node.Step());  // accepted: that may allocate
  };

  post_all(100);
  node.RunUntilIdle();
  const uint64_t preemptions = actor.counters().preemptions;
  ASSERT_GT(preemptions, 0u);  // recomputation is part of what must not allocate

  post_all(200);
  node.OnEnter([](bool inside) { counting = inside; });
  node.RunUntilIdle();
  counting = false;
  node.OnEnter(nullptr);
  EXPECT_EQ(tokens, 2u * 5 * 80);
  EXPECT_EQ(scores, 2u * 50);
  EXPECT_GT(actor.counters().preemptions, preemptions);
  EXPECT_EQ(allocations, 0u);

  // The counter does count.
  allocations = 0;
  counting = true;
  delete new int(1);
  counting = false;
  EXPECT_EQ(allocations, 1u);
}

TEST(AllocationTest, StepsAllocateNothingAfterWarmUp) {
  ExpectNoAllocations(cluster_test::MakeTestBackend());
}

TEST(AllocationTest, NorDoTheyWithTheCpuKernels) {
  auto backend = kernels::cpu::CpuBackend::Create({.num_threads = 2, .min_parallel_work = 1000});
  ASSERT_TRUE(backend.ok());
  ExpectNoAllocations(*std::move(backend));
}

}  // namespace
}  // namespace moebius::attention_worker
