#include "services/common/stall_watch.h"

#include <algorithm>
#include <utility>

namespace moebius::services {
namespace {

int64_t NowNs() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

}  // namespace

StallWatch::Stream::Stream(StallWatch& watch, std::function<void()> cut)
    : watch_(watch), cut_(std::move(cut)) {
  std::lock_guard<std::mutex> lock(watch_.mutex_);
  watch_.streams_.insert(this);
}

StallWatch::Stream::~Stream() {
  std::lock_guard<std::mutex> lock(watch_.mutex_);
  watch_.streams_.erase(this);
}

void StallWatch::Stream::Begin() { since_ns_.store(NowNs()); }

StallWatch::StallWatch(std::chrono::milliseconds limit) : limit_(limit) {
  thread_ = std::thread([this] { Loop(); });
}

StallWatch::~StallWatch() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void StallWatch::Loop() {
  const auto period = std::max(limit_ / 4, std::chrono::milliseconds(1));
  const int64_t period_ns = std::chrono::nanoseconds(period).count();
  const int64_t limit_ns = std::chrono::nanoseconds(limit_).count();
  std::unique_lock<std::mutex> lock(mutex_);
  int64_t looked = NowNs();
  while (!wake_.wait_for(lock, period, [this] { return stopping_; })) {
    const int64_t now = NowNs();
    // One that wakes up late has itself been away.
    const int64_t away = std::max<int64_t>(now - looked - 2 * period_ns, 0);
    looked = now;
    for (Stream* stream : streams_) {
      int64_t since = stream->since_ns_.load();
      if (since == 0 || !stream->cut_) continue;
      if (away > 0) {
        // Unless the step has ended, or another begun.
        stream->since_ns_.compare_exchange_strong(since, std::min(since + away, now));
        continue;
      }
      if (now - since < limit_ns) continue;
      stream->cut_();
      stream->cut_ = nullptr;
    }
  }
}

}  // namespace moebius::services
