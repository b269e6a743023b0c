#pragma once

// From the node's loop (which must never block) to the thread of one request's stream. Bounded: a
// client that does not read fills it and is cut off, rather than slowing the loop. The stream's
// thread may be inside a write that cannot end then, so it is the loop that acts: `on_overflow`.

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>

namespace moebius::services {

template <typename Event>
class EventQueue {
 public:
  // `on_overflow` runs once, on the loop thread, at the first event over the limit; it must not
  // call this queue.
  explicit EventQueue(size_t limit, std::function<void()> on_overflow = nullptr)
      : limit_(limit), on_overflow_(std::move(on_overflow)) {}

  // Loop thread. False once the queue overflowed: the stream is lost and says so.
  bool Push(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() >= limit_ && !overflowed_) {
      overflowed_ = true;
      if (on_overflow_) on_overflow_();
    }
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
  // Stream thread, at its end: `on_overflow` does not run any more (nor at this moment).
  void Close() {
    std::lock_guard<std::mutex> lock(mutex_);
    on_overflow_ = nullptr;
  }
  bool overflowed() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return overflowed_;
  }

 private:
  const size_t limit_;
  std::function<void()> on_overflow_;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Event> events_;
  bool overflowed_ = false;
};

}  // namespace moebius::services
