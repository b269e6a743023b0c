#pragma once

// A fixed set of compute threads that split ranges of independent units (rows, outputs, heads). The
// split is static: thread i of n always gets the i-th of n nearly equal contiguous parts, and what
// a unit computes does not depend on who computes it (row rule, part a).
//
// A call allocates nothing. Idle threads spin briefly, then sleep on a futex. Every thread computes
// in FloatEnvironment's modes. Run() is called by one thread at a time, never from a unit.

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace moebius::kernels::cpu {

class ThreadPool {
 public:
  // `num_threads` >= 1 counts the calling thread; one thread starts none.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls function(begin, end, thread) for disjoint parts of [0, units) that cover it, thread in
  // [0, num_threads()), and returns when all are done. With `parallel` false the caller does all.
  template <class Function>
  void Run(int64_t units, bool parallel, const Function& function) {
    RunErased(units, parallel, &Call<Function>, &function);
  }

 private:
  using Erased = void (*)(const void* function, int64_t begin, int64_t end, int thread);

  template <class Function>
  static void Call(const void* function, int64_t begin, int64_t end, int thread) {
    (*static_cast<const Function*>(function))(begin, end, thread);
  }

  void RunErased(int64_t units, bool parallel, Erased call, const void* function);
  void Work(int thread);
  void RunPart(int thread) const;

  const int num_threads_;
  // The job in hand: written by Run before it raises generation_, read by workers after.
  int64_t units_ = 0;
  Erased call_ = nullptr;
  const void* function_ = nullptr;
  std::atomic<uint32_t> generation_{0};  // one per job
  std::atomic<uint32_t> pending_{0};     // workers that have not finished the job
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace moebius::kernels::cpu
