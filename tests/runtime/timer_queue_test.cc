// Goal: timers fire in order of deadline, once, and a cancelled one never does.

#include "runtime/timer_queue.h"

#include <vector>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::runtime {
namespace {

TEST(TimerQueue, FiresInOrderAndSkipsTheCancelled) {
  TimerQueue queue;
  const uint64_t late = queue.Set(TimePoint{30}, ActorId(1), 3);
  const uint64_t cancelled = queue.Set(TimePoint{10}, ActorId(1), 1);
  queue.Set(TimePoint{20}, ActorId(2), 2);
  queue.Set(TimePoint{20}, ActorId(2), 4);
  queue.Cancel(cancelled);
  EXPECT_FALSE(queue.Pop(TimePoint{15}).has_value());
  EXPECT_EQ(queue.Pop(TimePoint{25})->tag, 2u);
  EXPECT_EQ(queue.Pop(TimePoint{25})->tag, 4u) << "equal deadlines in the order they were set";
  EXPECT_FALSE(queue.Pop(TimePoint{25}).has_value());
  EXPECT_EQ(queue.Pop(TimePoint{30})->timer, late);
  queue.Cancel(late);  // fired already: nothing happens
  EXPECT_FALSE(queue.NextDeadline().has_value());
}

TEST(TimerQueue, NumbersAreNeverUsedAgain) {
  TimerQueue queue;
  Prng prng(3);
  std::vector<uint64_t> live;
  uint64_t fired = 0, cancelled = 0, now = 0;
  for (int i = 0; i < 5000; ++i) {
    live.push_back(queue.Set(TimePoint{static_cast<int64_t>(now + prng.Below(50))}, ActorId(1), 0));
    if (prng.Below(3) == 0) {
      const size_t at = prng.Below(live.size());
      queue.Cancel(live[at]);
      live.erase(live.begin() + static_cast<int64_t>(at));
      ++cancelled;
    }
    now += prng.Below(5);
    while (const auto timer = queue.Pop(TimePoint{static_cast<int64_t>(now)})) {
      const auto it = std::find(live.begin(), live.end(), timer->timer);
      ASSERT_NE(it, live.end());
      live.erase(it);
      ++fired;
    }
  }
  EXPECT_EQ(fired + cancelled + live.size(), 5000u);
}

}  // namespace
}  // namespace moebius::runtime
