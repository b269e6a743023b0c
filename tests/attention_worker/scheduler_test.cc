#include "attention_worker/scheduler.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::attention_worker {
namespace {

// Drives a Scheduler as the actor does, with tokens that need no model, and checks the policy's
// invariants at every step.
class Harness {
 public:
  Harness(const SchedulerLimits& limits, int32_t num_blocks)
      : limits_(limits), pool_(num_blocks, 0, 0), scheduler_(limits, &pool_) {
    items_.reserve(limits.max_running);
  }

  bool Add(uint64_t id, int64_t prompt, int64_t max_tokens) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = RequestId(id);
    sequence->tokens.assign(prompt, 7);
    sequence->prompt_length = prompt;
    sequence->max_length = prompt + max_tokens;
    return scheduler_.Enqueue(sequence);
  }

  // One step. Returns "id:count" of each item.
  std::string Step() {
    scheduler_.Reap();
    scheduler_.Plan(items_);
    std::string out;
    int64_t rows = 0;
    uint64_t last_arrival = 0;
    for (const StepItem& item : items_) {
      const Sequence& s = *item.sequence;
      rows += item.count;
      EXPECT_GT(item.count, 0);
      EXPECT_LE(item.count, std::max(limits_.prefill_chunk, 1));
      EXPECT_EQ(item.begin, s.computed);
      EXPECT_LE(item.begin + item.count, s.length());
      EXPECT_GE(static_cast<int64_t>(s.block_table.size()),
                BlocksForTokens(item.begin + item.count));
      if (&item != &items_[0]) {
        EXPECT_GT(s.arrival, last_arrival);
      }
      last_arrival = s.arrival;
      absl::StrAppend(&out, out.empty() ? "" : " ", s.id.value(), ":", item.count);
    }
    EXPECT_LE(rows, limits_.max_step_tokens);
    EXPECT_LE(scheduler_.running(), static_cast<size_t>(limits_.max_running));
    for (const StepItem& item : items_) {
      scheduler_.Advance(item);
      Sequence* s = item.sequence;
      if (s->remaining() > 0) continue;
      s->tokens.push_back(8);
      if (s->length() == s->max_length) {
        finished_.push_back(s->id.value());
        scheduler_.Finish(s);
      }
    }
    return out;
  }

  KvBlockPool& pool() { return pool_; }
  Scheduler& scheduler() { return scheduler_; }
  const std::vector<uint64_t>& finished() const { return finished_; }

 private:
  SchedulerLimits limits_;
  KvBlockPool pool_;
  Scheduler scheduler_;
  std::vector<StepItem> items_;
  std::vector<uint64_t> finished_;
};

TEST(SchedulerTest, PrefillsInChunksThenDecodes) {
  Harness h({.max_step_tokens = 64, .prefill_chunk = 16, .max_running = 8, .max_waiting = 8}, 10);
  ASSERT_TRUE(h.Add(1, 40, 3));
  EXPECT_EQ(h.Step(), "1:16");
  EXPECT_EQ(h.Step(), "1:16");
  EXPECT_EQ(h.Step(), "1:8");  // gives the first token
  EXPECT_EQ(h.Step(), "1:1");
  EXPECT_EQ(h.Step(), "1:1");
  EXPECT_EQ(h.Step(), "");
  EXPECT_EQ(h.finished(), std::vector<uint64_t>{1});
  EXPECT_EQ(h.pool().used_blocks(), 0);
}

TEST(SchedulerTest, DecodesKeepTheirRowsBesideALongPrefill) {
  Harness h({.max_step_tokens = 20, .prefill_chunk = 100, .max_running = 8, .max_waiting = 8}, 50);
  ASSERT_TRUE(h.Add(1, 20, 100));
  EXPECT_EQ(h.Step(), "1:20");
  ASSERT_TRUE(h.Add(2, 200, 5));
  ASSERT_TRUE(h.Add(3, 4, 100));
  EXPECT_EQ(h.Step(), "1:1 2:19");
  EXPECT_EQ(h.Step(), "1:1 2:19");  // 3 waits: the budget is used up, first come first served
  for (int i = 0; i < 8; ++i) EXPECT_EQ(h.Step(), "1:1 2:19");
  EXPECT_EQ(h.Step(), "1:1 2:10 3:4");
  EXPECT_EQ(h.Step(), "1:1 2:1 3:1");
}

TEST(SchedulerTest, AdmissionIsFirstComeFirstServed) {
  // 2 does not fit beside 1; 3 would, but may not overtake.
  Harness h({.max_step_tokens = 200, .prefill_chunk = 200, .max_running = 8, .max_waiting = 8}, 4);
  ASSERT_TRUE(h.Add(1, 64, 3));
  ASSERT_TRUE(h.Add(2, 250, 2));
  ASSERT_TRUE(h.Add(3, 10, 2));
  EXPECT_EQ(h.Step(), "1:64");
  EXPECT_EQ(h.Step(), "1:1");
  EXPECT_EQ(h.Step(), "1:1");
  EXPECT_EQ(h.Step(), "2:200");
  EXPECT_EQ(h.Step(), "2:50");
  EXPECT_EQ(h.Step(), "2:1");
  EXPECT_EQ(h.Step(), "3:10");
}

TEST(SchedulerTest, TheLatestArrivalIsPreemptedAndComesBackFirst) {
  // Three blocks, three sequences that each grow to two.
  Harness h({.max_step_tokens = 300, .prefill_chunk = 300, .max_running = 8, .max_waiting = 8}, 3);
  ASSERT_TRUE(h.Add(1, 63, 20));
  ASSERT_TRUE(h.Add(2, 60, 20));
  ASSERT_TRUE(h.Add(3, 60, 20));
  ASSERT_TRUE(h.Add(4, 10, 2));
  EXPECT_EQ(h.Step(), "1:63 2:60 3:60");
  EXPECT_EQ(h.Step(), "1:1 2:1 3:1");  // 1 now fills its block
  EXPECT_EQ(h.Step(), "1:1 2:1");      // 1 needs a second: 3 goes
  EXPECT_EQ(h.scheduler().preemptions(), 1u);
  EXPECT_EQ(h.scheduler().Find(RequestId(3))->preemptions, 1u);
  EXPECT_EQ(h.scheduler().Find(RequestId(3))->computed, 0);
  EXPECT_EQ(h.scheduler().Find(RequestId(3))->length(), 62);  // its tokens are kept
  while (h.scheduler().Find(RequestId(3))->state == SequenceState::kWaiting) {
    ASSERT_EQ(h.scheduler().Find(RequestId(4))->state, SequenceState::kWaiting);
    ASSERT_NE(h.Step(), "");
  }
  while (!h.scheduler().empty()) ASSERT_NE(h.Step(), "");
  EXPECT_EQ(h.finished().size(), 4u);
  EXPECT_EQ(h.pool().used_blocks(), 0);
}

TEST(SchedulerTest, TheLatestWaitsForItsEldersInsteadOfPreemptingItself) {
  Harness h({.max_step_tokens = 300, .prefill_chunk = 300, .max_running = 8, .max_waiting = 8}, 3);
  ASSERT_TRUE(h.Add(1, 70, 6));
  ASSERT_TRUE(h.Add(2, 62, 8));
  EXPECT_EQ(h.Step(), "1:70 2:62");
  EXPECT_EQ(h.Step(), "1:1 2:1");
  EXPECT_EQ(h.Step(), "1:1 2:1");
  EXPECT_EQ(h.Step(), "1:1");  // 2 needs a second block and is the latest
  EXPECT_EQ(h.Step(), "1:1");
  EXPECT_EQ(h.Step(), "1:1");  // finishes
  EXPECT_EQ(h.Step(), "2:1");
  EXPECT_EQ(h.scheduler().preemptions(), 0u);
}

TEST(SchedulerTest, WaitingIsBounded) {
  Harness h({.max_step_tokens = 8, .prefill_chunk = 8, .max_running = 1, .max_waiting = 2}, 10);
  EXPECT_TRUE(h.Add(1, 4, 4));
  EXPECT_TRUE(h.Add(2, 4, 4));
  EXPECT_FALSE(h.Add(3, 4, 4));
  h.Step();  // admits 1
  EXPECT_TRUE(h.Add(4, 4, 4));
}

TEST(SchedulerTest, CancellationFreesBlocksAtOnce) {
  Harness h({.max_step_tokens = 300, .prefill_chunk = 300, .max_running = 8, .max_waiting = 8}, 4);
  ASSERT_TRUE(h.Add(1, 200, 6));
  ASSERT_TRUE(h.Add(2, 100, 6));
  h.Step();
  EXPECT_EQ(h.pool().used_blocks(), 4);
  Sequence* first = h.scheduler().Find(RequestId(1));
  const std::vector<int32_t> table = first->block_table;
  h.scheduler().Finish(first);
  EXPECT_EQ(h.pool().used_blocks(), 0);
  EXPECT_EQ(first->block_table, table);  // still readable by a step in flight
  EXPECT_EQ(h.scheduler().Find(RequestId(1)), nullptr);
  h.scheduler().Finish(h.scheduler().Find(RequestId(2)));  // waiting: held nothing
  EXPECT_TRUE(h.scheduler().empty());
  EXPECT_EQ(h.Step(), "");
}

// Random loads in pools barely larger than the largest request: everything finishes, in a bounded
// number of steps, and the oldest advances in each step.
TEST(SchedulerTest, RandomLoadsFinishWithoutStarvation) {
  uint64_t preemptions = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Prng prng(seed);
    SchedulerLimits limits;
    limits.max_running = 1 + static_cast<int32_t>(prng.Below(10));
    limits.max_step_tokens = limits.max_running + static_cast<int32_t>(prng.Below(100));
    limits.prefill_chunk = 1 + static_cast<int32_t>(prng.Below(100));
    limits.max_waiting = 100;
    const auto blocks = 4 + static_cast<int32_t>(prng.Below(4));
    Harness h(limits, blocks);
    uint64_t added = 0;
    int64_t rows_needed = 0;
    int64_t steps = 0;
    while (added < 20 || !h.scheduler().empty()) {
      if (added < 20 && prng.Below(3) == 0) {
        const int64_t prompt = 1 + static_cast<int64_t>(prng.Below(120));
        const int64_t max_tokens = 1 + static_cast<int64_t>(prng.Below(130));
        ASSERT_TRUE(h.Add(added++, prompt, max_tokens));
        rows_needed += prompt + max_tokens;
      }
      const Sequence* oldest = h.scheduler().Oldest();
      const uint64_t oldest_id = oldest ? oldest->id.value() : 0;
      const size_t finished = h.finished().size();
      const int64_t computed = oldest ? oldest->computed : 0;
      h.Step();
      if (oldest != nullptr && h.finished().size() == finished) {
        const Sequence* same = h.scheduler().Find(RequestId(oldest_id));
        ASSERT_NE(same, nullptr);
        ASSERT_GT(same->computed, computed) << "the oldest stood still, seed " << seed;
      }
      ASSERT_LT(++steps, 20 * rows_needed + 1000) << "seed " << seed;
    }
    EXPECT_EQ(h.finished().size(), 20u);
    EXPECT_EQ(h.pool().used_blocks(), 0);
    preemptions += h.scheduler().preemptions();
  }
  EXPECT_GT(preemptions, 300u);  // the loads do exercise preemption
}

}  // namespace
}  // namespace moebius::attention_worker
