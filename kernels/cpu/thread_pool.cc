#include "kernels/cpu/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/check.h"
#include "kernels/cpu/float_environment.h"

namespace moebius::kernels::cpu {
namespace {

// About 10-20 us: longer than the gap between two operations of a step, short enough not to take a
// core from another process.
constexpr int kSpins = 400;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Returns once `value` differs from `old`.
void AwaitChange(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads) {
  CHECK_GE(num_threads, 1);
  workers_.reserve(static_cast<size_t>(num_threads - 1));
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { Work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::RunPart(int thread) const {
  const int64_t begin = units_ * thread / num_threads_;
  const int64_t end = units_ * (thread + 1) / num_threads_;
  if (begin < end) call_(function_, begin, end, thread);
}

void ThreadPool::Work(int thread) {
  const FloatEnvironment environment;
  uint32_t seen = 0;
  while (true) {
    AwaitChange(generation_, seen);
    ++seen;
    if (stopping_.load(std::memory_order_relaxed)) return;
    RunPart(thread);
    if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
  }
}

void ThreadPool::RunErased(int64_t units, bool parallel, Erased call, const void* function) {
  if (units <= 0) return;
  if (!parallel || num_threads_ == 1 || units == 1) {
    call(function, 0, units, 0);
    return;
  }
  units_ = units;
  call_ = call;
  function_ = function;
  pending_.store(static_cast<uint32_t>(num_threads_ - 1), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  RunPart(0);
  for (uint32_t left = pending_.load(std::memory_order_acquire); left != 0;
       left = pending_.load(std::memory_order_acquire)) {
    AwaitChange(pending_, left);
  }
}

}  // namespace moebius::kernels::cpu
