// Goal: works of one actor run in order and never at once, on threads with the row rule's
// floating-point mode; every completion is reported.

#include "runtime/compute_pool.h"

#include <xmmintrin.h>

#include <atomic>
#include <map>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::runtime {
namespace {

// Waits for completions without polling: the pool's callback counts them.
class Waiter {
 public:
  void Done() {
    finished_.fetch_add(1);
    finished_.notify_all();
  }
  void Await(int count) {
    for (int seen = finished_.load(); seen < count; seen = finished_.load()) finished_.wait(seen);
  }

 private:
  std::atomic<int> finished_{0};
};

TEST(ComputePool, OneActorsWorksRunInOrderAndOneAtATime) {
  constexpr int kActors = 3;
  constexpr int kWorks = 40;
  struct State {
    std::atomic<int> inside{0};
    std::vector<int> order;  // guarded by the strand itself: TSan would tell
  };
  std::vector<State> states(kActors);
  std::atomic<int> overlaps{0};
  Waiter waiter;
  ComputePool pool(4, [&] { waiter.Done(); });
  for (int work = 0; work < kWorks; ++work) {
    for (int actor = 0; actor < kActors; ++actor) {
      pool.Submit(
          ActorId(static_cast<uint16_t>(actor + 1)),
          [&, actor, work] {
            State& state = states[static_cast<size_t>(actor)];
            if (state.inside.fetch_add(1) != 0) overlaps.fetch_add(1);
            state.order.push_back(work);
            state.inside.fetch_sub(1);
            return work == 7 ? absl::InternalError("seven") : absl::OkStatus();
          },
          static_cast<uint64_t>(work));
    }
  }
  waiter.Await(kActors * kWorks);
  EXPECT_EQ(overlaps.load(), 0);
  std::vector<ComputeCompletion> completions;
  pool.TakeCompletions(completions);
  ASSERT_EQ(completions.size(), size_t{kActors * kWorks});
  std::map<ActorId, uint64_t> next;
  for (const ComputeCompletion& completion : completions) {
    EXPECT_EQ(completion.tag, next[completion.actor]++);
    EXPECT_EQ(completion.status.ok(), completion.tag != 7);
  }
  for (const State& state : states) {
    ASSERT_EQ(state.order.size(), size_t{kWorks});
    for (int work = 0; work < kWorks; ++work)
      EXPECT_EQ(state.order[static_cast<size_t>(work)], work);
  }
}

TEST(ComputePool, ThreadsRoundToNearestAndKeepDenormals) {
  // Threads inherit the mode of their creator: one that flushes denormals must not leak in.
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
  unsigned mode = 0;
  volatile float smallest = 1e-38f;
  float product = 0;
  Waiter waiter;
  {
    ComputePool pool(1, [&] { waiter.Done(); });
    pool.Submit(
        ActorId(1),
        [&] {
          mode = _mm_getcsr() & 0xFFC0;  // control bits; the low six are sticky flags
          product = smallest * 0.25f;
          return absl::OkStatus();
        },
        0);
    waiter.Await(1);
  }
  _mm_setcsr(before);
  EXPECT_EQ(mode, 0x1F80u);
  EXPECT_GT(product, 0.0f);
}

}  // namespace
}  // namespace moebius::runtime
