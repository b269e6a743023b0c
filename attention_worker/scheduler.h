#pragma once

// Decides which rows of which sequences the next step computes: continuous batching with a token
// budget, chunked prefill, first come first served, preemption by recomputation.
//
// Policy. Every sequence has a place in the order of arrival, for life:
//   1. Those running arrived before those waiting; both lists are in that order.
//   2. Each running sequence with one row to compute (decoding) has that row reserved in the
//   budget;
//      what is left goes to prefills in order, at most prefill_chunk rows each.
//   3. A sequence that finds no free block takes those of the latest arrival that is running: the
//      victim goes back to the head of the waiting list and is later computed anew from its tokens
//      (prompt and generated ones), which gives the same bits. One that is itself the latest waits.
//   4. The head of the waiting list is admitted when a running slot is free, the budget has rows
//      left, and all its tokens fit beside what those running still need for theirs.
// So the oldest sequence always advances, and since any accepted sequence fits the pool alone,
// everything finishes. No one overtakes in admission, so no one starves.
//
// Threading: loop thread. Plan() runs between steps only; nothing else hands out blocks. No
// allocation after construction except in Enqueue's caller.

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "attention_worker/kv_block_pool.h"
#include "attention_worker/sequence.h"

namespace moebius::attention_worker {

struct SchedulerLimits {
  int32_t max_step_tokens = 0;
  int32_t prefill_chunk = 0;
  int32_t max_running = 0;
  int32_t max_waiting = 0;
};

// Rows [begin, begin + count) of a sequence, computed in one step. The rows reach to the end of the
// sequence's tokens iff begin + count == sequence->length(): then the last row gives the next
// token.
struct StepItem {
  Sequence* sequence = nullptr;
  int64_t begin = 0;
  int32_t count = 0;
};

class Scheduler {
 public:
  // `pool` is borrowed. REQUIRES: 0 < max_running <= max_step_tokens, prefill_chunk > 0.
  Scheduler(const SchedulerLimits& limits, KvBlockPool* pool);

  // Takes a new sequence in state kWaiting with tokens set. False (ownership stays) when
  // max_waiting are waiting. REQUIRES: the sequence at its full length fits the pool.
  bool Enqueue(std::unique_ptr<Sequence>& sequence);

  // Fills `items` (cleared first; reserved by the caller for max_running) in the order of arrival.
  // Empty only if there is no sequence.
  void Plan(std::vector<StepItem>& items);

  // The item's cache rows are written.
  void Advance(const StepItem& item);

  // Its blocks are free at once; the object lives until Reap. REQUIRES: not finished.
  void Finish(Sequence* sequence);

  // Destroys finished sequences. REQUIRES: no step in flight.
  void Reap() { finished_.clear(); }

  // nullptr if unknown or finished.
  Sequence* Find(RequestId id) const;
  Sequence* FindByTimer(uint64_t deadline_timer) const;
  // The oldest unfinished sequence, or nullptr.
  Sequence* Oldest() const;

  size_t running() const { return running_.size(); }
  size_t waiting() const { return waiting_.size(); }
  bool empty() const { return running_.empty() && waiting_.empty(); }
  uint64_t preemptions() const { return preemptions_; }

 private:
  // Gives `sequence` blocks for up to `rows` more rows, preempting later arrivals only if it could
  // not advance at all otherwise. Returns the number of rows it can compute now.
  int32_t Reserve(Sequence* sequence, int32_t rows);
  void PreemptLatest();
  void AdmitWaiting(int32_t& budget, std::vector<StepItem>& items);
  int64_t BlocksOwed() const;  // that running sequences need to hold all their present tokens

  const SchedulerLimits limits_;
  KvBlockPool* const pool_;
  uint64_t arrivals_ = 0;
  uint64_t preemptions_ = 0;
  std::vector<std::unique_ptr<Sequence>> running_;  // ascending arrival
  std::vector<std::unique_ptr<Sequence>> waiting_;  // ascending arrival
  std::vector<std::unique_ptr<Sequence>> finished_;
};

}  // namespace moebius::attention_worker
