#pragma once

// Ends calls that stall. A write to a client that does not read blocks on HTTP/2 flow control for
// as long as the connection lives, and so does a read from a host that vanished without a word;
// nothing but cancelling the call ends either.
//
// Time in which this process did not run (stopped, its cores taken away) does not count: what came
// meanwhile has not been read yet, and nobody else is to blame.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

namespace moebius::services {

class StallWatch {
 public:
  // A step (one write, one read) that takes longer than `limit` (up to a quarter more) is cut off.
  explicit StallWatch(std::chrono::milliseconds limit);
  ~StallWatch();

  // One call's stream, on its thread. `cut` runs on the watch's thread, at most once, and never
  // after the destructor has begun to return.
  class Stream {
   public:
    Stream(StallWatch& watch, std::function<void()> cut);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    void Begin();
    void End() { since_ns_.store(0); }

   private:
    friend class StallWatch;
    StallWatch& watch_;
    std::function<void()> cut_;         // empty once it ran; under the watch's lock
    std::atomic<int64_t> since_ns_{0};  // steady clock; 0: no step is under way
  };

 private:
  void Loop();

  const std::chrono::milliseconds limit_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::set<Stream*> streams_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace moebius::services
