// Goal: timers fire in order of deadline, then of setting; a cancelled one never fires.

#include "runtime/timer_queue.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::runtime {
namespace {

constexpr ActorId kActor{7};

std::vector<uint64_t> TagsDue(TimerQueue& timers, TimePoint now) {
  std::vector<uint64_t> tags;
  while (const auto fired = timers.Pop(now)) tags.push_back(fired->tag);
  return tags;
}

TEST(TimerQueue, EqualDeadlinesFireInTheOrderTheyWereSet) {
  TimerQueue timers;
  timers.Set({20}, kActor, 1);
  timers.Set({10}, kActor, 2);
  timers.Set({20}, kActor, 3);
  timers.Set({10}, kActor, 4);
  EXPECT_EQ(timers.NextDeadline(), TimePoint{10});
  EXPECT_TRUE(TagsDue(timers, {9}).empty());
  EXPECT_EQ(TagsDue(timers, {20}), (std::vector<uint64_t>{2, 4, 1, 3}));
  EXPECT_EQ(timers.NextDeadline(), std::nullopt);
}

TEST(TimerQueue, CancellingWhatIsNotThereDoesNothing) {
  TimerQueue timers;
  timers.Cancel(0);
  timers.Cancel(~uint64_t{0});
  const uint64_t first = timers.Set({10}, kActor, 1);
  EXPECT_EQ(TagsDue(timers, {10}).size(), 1u);
  const uint64_t second = timers.Set({20}, kActor, 2);  // takes the slot of the first
  timers.Cancel(first);
  EXPECT_NE(first, second);
  EXPECT_EQ(TagsDue(timers, {20}), std::vector<uint64_t>{2});
}

TEST(TimerQueue, AgreesWithAnOrderedMap) {
  TimerQueue timers;
  std::map<std::pair<int64_t, uint64_t>, uint64_t> expected;  // (deadline, tag) -> timer
  Prng prng(1);
  int64_t now = 0;
  uint64_t tag = 0;
  for (int i = 0; i < 20000; ++i) {
    const uint64_t choice = prng.Below(10);
    if (choice < 5) {
      const int64_t deadline = now + static_cast<int64_t>(prng.Below(50));
      ++tag;
      expected[{deadline, tag}] = timers.Set({deadline}, kActor, tag);
    } else if (choice < 7 && !expected.empty()) {
      auto victim = expected.begin();
      std::advance(victim, static_cast<int64_t>(prng.Below(std::min<size_t>(expected.size(), 20))));
      timers.Cancel(victim->second);
      expected.erase(victim);
    } else {
      now += static_cast<int64_t>(prng.Below(10));
      for (uint64_t fired : TagsDue(timers, {now})) {
        ASSERT_FALSE(expected.empty());
        ASSERT_EQ(fired, expected.begin()->first.second);
        expected.erase(expected.begin());
      }
      ASSERT_TRUE(expected.empty() || expected.begin()->first.first > now);
    }
  }
}

}  // namespace
}  // namespace moebius::runtime
