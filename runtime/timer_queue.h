#pragma once

// Timers of one node's actors: a binary heap over reusable slots, so that setting and cancelling
// allocate nothing once the node is warm. Equal deadlines fire in the order they were set. Not
// thread-safe.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "base/check.h"
#include "base/ids.h"
#include "runtime/clock.h"

namespace moebius::runtime {

class TimerQueue {
 public:
  struct Fired {
    ActorId actor;
    uint64_t timer = 0;
    uint64_t tag = 0;
  };

  // Returns the timer's number, never 0 and never used again.
  uint64_t Set(TimePoint deadline, ActorId actor, uint64_t tag) {
    uint32_t slot;
    if (free_.empty()) {
      slot = static_cast<uint32_t>(slots_.size());
      CHECK_LE(slot, kSlotMask);
      slots_.emplace_back();
    } else {
      slot = free_.back();
      free_.pop_back();
    }
    const uint64_t timer = (++sequence_ << 20) | slot;
    slots_[slot] = Slot{timer, actor, tag};
    heap_.push_back(Entry{deadline, timer});
    std::push_heap(heap_.begin(), heap_.end(), Later);
    return timer;
  }

  void Cancel(uint64_t timer) {
    const size_t index = timer & kSlotMask;
    if (index >= slots_.size()) return;  // 0, or no timer of this queue
    Slot& slot = slots_[index];
    if (slot.timer == timer) slot.timer = 0;  // its heap entry is skipped when it comes up
  }

  // The next timer with deadline <= now, or nullopt.
  std::optional<Fired> Pop(TimePoint now) {
    while (!heap_.empty()) {
      const Entry top = heap_.front();
      const uint32_t index = static_cast<uint32_t>(top.timer & kSlotMask);
      const bool cancelled = slots_[index].timer != top.timer;
      if (!cancelled && top.deadline > now) return std::nullopt;
      std::pop_heap(heap_.begin(), heap_.end(), Later);
      heap_.pop_back();
      const Slot slot = slots_[index];
      slots_[index].timer = 0;
      free_.push_back(index);
      if (!cancelled) return Fired{slot.actor, top.timer, slot.tag};
    }
    return std::nullopt;
  }

  // Deadline of the earliest timer (a cancelled one may make it too early, never too late).
  std::optional<TimePoint> NextDeadline() const {
    if (heap_.empty()) return std::nullopt;
    return heap_.front().deadline;
  }

 private:
  static constexpr uint64_t kSlotMask = (1u << 20) - 1;
  struct Slot {
    uint64_t timer = 0;
    ActorId actor;
    uint64_t tag = 0;
  };
  struct Entry {
    TimePoint deadline;
    uint64_t timer;
  };
  static bool Later(const Entry& a, const Entry& b) {
    return a.deadline != b.deadline ? a.deadline > b.deadline : a.timer > b.timer;
  }
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  std::vector<Entry> heap_;
  uint64_t sequence_ = 0;
};

}  // namespace moebius::runtime
