#pragma once

// Ends streams whose client does not read. A write to such a client blocks on HTTP/2 flow control
// for as long as the connection lives, and with it a thread and a place among the requests in
// flight; nothing but cancelling the call ends it.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

namespace moebius::services {

class WriteWatch {
 public:
  // A write that takes longer than `limit` (up to a quarter more) is cut off.
  explicit WriteWatch(std::chrono::milliseconds limit);
  ~WriteWatch();

  // One call's stream, on its thread. `cut` runs on the watch's thread, at most once, and never
  // after the destructor has begun to return.
  class Stream {
   public:
    Stream(WriteWatch& watch, std::function<void()> cut);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    void BeginWrite();
    void EndWrite() { since_ns_.store(0); }

   private:
    friend class WriteWatch;
    WriteWatch& watch_;
    std::function<void()> cut_;         // empty once it ran; under the watch's lock
    std::atomic<int64_t> since_ns_{0};  // steady clock; 0: no write is out
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
