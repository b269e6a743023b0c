#pragma once

// A FIFO of fixed capacity that allocates once: the mailbox of a node. Not thread-safe.

#include <cstddef>
#include <utility>
#include <vector>

#include "base/check.h"

namespace moebius::runtime {

template <typename T>
class Ring {
 public:
  explicit Ring(size_t capacity) : slots_(capacity) { CHECK_GT(capacity, size_t{0}); }
  bool empty() const { return size_ == 0; }
  bool full() const { return size_ == slots_.size(); }
  size_t size() const { return size_; }
  size_t capacity() const { return slots_.size(); }
  // REQUIRES: !full().
  void Push(T value) {
    CHECK(!full());
    slots_[(head_ + size_) % slots_.size()] = std::move(value);
    ++size_;
  }
  // REQUIRES: !empty(). Leaves a default value in the slot, so that what it owned is released.
  T Pop() {
    CHECK(!empty());
    T value = std::exchange(slots_[head_], T());
    head_ = (head_ + 1) % slots_.size();
    --size_;
    return value;
  }

 private:
  std::vector<T> slots_;
  size_t head_ = 0;
  size_t size_ = 0;
};

}  // namespace moebius::runtime
