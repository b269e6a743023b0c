#include "attention_worker/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace moebius::attention_worker {

Scheduler::Scheduler(const SchedulerLimits& limits, KvBlockPool* pool)
    : limits_(limits), pool_(pool) {
  CHECK_GT(limits.prefill_chunk, 0);
  CHECK_GT(limits.max_running, 0);
  CHECK_LE(limits.max_running, limits.max_step_tokens);
  running_.reserve(limits.max_running);
  // Preempted sequences return to the waiting list on top of those accepted.
  waiting_.reserve(limits.max_waiting + limits.max_running);
  finished_.reserve(limits.max_waiting + limits.max_running);
}

bool Scheduler::Enqueue(std::unique_ptr<Sequence>& sequence) {
  CHECK(sequence->state == SequenceState::kWaiting);
  CHECK(!sequence->tokens.empty());
  if (waiting_.size() >= static_cast<size_t>(limits_.max_waiting)) return false;
  sequence->arrival = arrivals_++;
  waiting_.push_back(std::move(sequence));
  return true;
}

void Scheduler::Plan(std::vector<StepItem>& items) {
  items.clear();
  int32_t budget = limits_.max_step_tokens;
  for (const auto& sequence : running_) {
    if (sequence->remaining() == 1) --budget;  // max_running <= max_step_tokens: never negative
  }
  const uint64_t preemptions_before = preemptions_;
  // Reserve may take sequences from the end of the list, never one at or before `i`.
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* sequence = running_[i].get();
    const bool decoding = sequence->remaining() == 1;
    const int32_t wanted = decoding ? 1
                                    : static_cast<int32_t>(std::min<int64_t>(
                                          {sequence->remaining(), limits_.prefill_chunk, budget}));
    if (wanted == 0) continue;
    const int32_t rows = Reserve(sequence, wanted);
    if (rows == 0) continue;
    items.push_back({sequence, sequence->computed, rows});
    if (!decoding) budget -= rows;
  }
  // Admitting beside a preemption would only take back blocks that were just needed.
  if (preemptions_ == preemptions_before) AdmitWaiting(budget, items);
  CHECK(!items.empty() || empty());
}

void Scheduler::AdmitWaiting(int32_t& budget, std::vector<StepItem>& items) {
  while (!waiting_.empty() && budget > 0 &&
         running_.size() < static_cast<size_t>(limits_.max_running)) {
    Sequence* head = waiting_.front().get();
    if (BlocksOwed() + BlocksForTokens(head->length()) > pool_->free_blocks()) return;
    const auto wanted =
        static_cast<int32_t>(std::min<int64_t>({head->remaining(), limits_.prefill_chunk, budget}));
    head->state = SequenceState::kRunning;
    running_.push_back(std::move(waiting_.front()));
    waiting_.erase(waiting_.begin());
    const int32_t rows = Reserve(head, wanted);
    CHECK_EQ(rows, wanted);
    items.push_back({head, head->computed, rows});
    budget -= rows;
  }
}

int64_t Scheduler::BlocksOwed() const {
  int64_t owed = 0;
  for (const auto& sequence : running_) {
    owed +=
        BlocksForTokens(sequence->length()) - static_cast<int64_t>(sequence->block_table.size());
  }
  return owed;
}

int32_t Scheduler::Reserve(Sequence* sequence, int32_t rows) {
  const int64_t needed = BlocksForTokens(sequence->computed + rows);
  auto& table = sequence->block_table;
  auto rows_covered = [&] {
    const int64_t covered =
        static_cast<int64_t>(table.size()) * kernels::kCacheBlockTokens - sequence->computed;
    return static_cast<int32_t>(std::min<int64_t>(covered, rows));
  };
  while (static_cast<int64_t>(table.size()) < needed) {
    if (pool_->Allocate(table)) continue;
    if (rows_covered() > 0) break;  // a shorter chunk is better than a neighbour's work undone
    if (running_.back().get() == sequence) return 0;  // the latest waits for its elders
    PreemptLatest();
  }
  return rows_covered();
}

void Scheduler::PreemptLatest() {
  std::unique_ptr<Sequence> victim = std::move(running_.back());
  running_.pop_back();
  pool_->Free(victim->block_table);
  victim->block_table.clear();
  victim->computed = 0;
  victim->state = SequenceState::kWaiting;
  ++victim->preemptions;
  ++preemptions_;
  CHECK(waiting_.empty() || victim->arrival < waiting_.front()->arrival);
  waiting_.insert(waiting_.begin(), std::move(victim));
}

void Scheduler::Advance(const StepItem& item) {
  Sequence* sequence = item.sequence;
  CHECK(sequence->state == SequenceState::kRunning);
  CHECK_EQ(sequence->computed, item.begin);
  sequence->computed += item.count;
  CHECK_LE(sequence->computed, sequence->length());
}

void Scheduler::Finish(Sequence* sequence) {
  CHECK(sequence->state != SequenceState::kFinished);
  auto& list = sequence->state == SequenceState::kRunning ? running_ : waiting_;
  auto it = std::find_if(list.begin(), list.end(),
                         [&](const auto& candidate) { return candidate.get() == sequence; });
  CHECK(it != list.end());
  // The table keeps its numbers: compute work of the step in flight may still read them.
  if (sequence->state == SequenceState::kRunning) pool_->Free(sequence->block_table);
  sequence->state = SequenceState::kFinished;
  finished_.push_back(std::move(*it));
  list.erase(it);
}

Sequence* Scheduler::Find(RequestId id) const {
  for (const auto* list : {&running_, &waiting_}) {
    for (const auto& sequence : *list) {
      if (sequence->id == id) return sequence.get();
    }
  }
  return nullptr;
}

Sequence* Scheduler::FindByTimer(uint64_t deadline_timer) const {
  for (const auto* list : {&running_, &waiting_}) {
    for (const auto& sequence : *list) {
      if (sequence->deadline_timer == deadline_timer) return sequence.get();
    }
  }
  return nullptr;
}

Sequence* Scheduler::Oldest() const {
  if (!running_.empty()) return running_.front().get();
  return waiting_.empty() ? nullptr : waiting_.front().get();
}

}  // namespace moebius::attention_worker
