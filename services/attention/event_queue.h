#pragma once

// From the node's loop (which must never block) to the thread of one request's stream. Bounded: a
// client that does not read fills it, and its request is then cancelled by the reader's side rather
// than slowing the loop.

#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

namespace moebius::services {

template <typename Event>
class EventQueue {
 public:
  explicit EventQueue(size_t limit) : limit_(limit) {}

  // Loop thread. False once the queue overflowed: the stream is lost and says so.
  bool Push(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() >= limit_) overflowed_ = true;
    if (!overflowed_) events_.push_back(std::move(event));
    ready_.notify_one();
    return !overflowed_;
  }

  // Stream thread: the next event, or nullopt after `timeout` or on overflow.
  template <typename Duration>
  std::optional<Event> Pop(Duration timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    ready_.wait_for(lock, timeout, [this] { return !events_.empty() || overflowed_; });
    if (events_.empty()) return std::nullopt;
    Event event = std::move(events_.front());
    events_.pop_front();
    return event;
  }
  bool overflowed() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return overflowed_;
  }

 private:
  const size_t limit_;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Event> events_;
  bool overflowed_ = false;
};

}  // namespace moebius::services
