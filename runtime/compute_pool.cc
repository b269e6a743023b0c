#include "runtime/compute_pool.h"

#include <xmmintrin.h>

#include <utility>

#include "base/check.h"

namespace moebius::runtime {

void SetComputeFloatMode() {
  // 0x1F80: all exceptions masked, round to nearest, no FTZ, no DAZ (the reset value of MXCSR).
  _mm_setcsr(0x1F80);
}

ComputePool::ComputePool(int threads, std::function<void()> on_completion)
    : on_completion_(std::move(on_completion)) {
  CHECK_GT(threads, 0);
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { ThreadMain(); });
}

ComputePool::~ComputePool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

ComputePool::Strand& ComputePool::StrandOf(ActorId actor) {
  for (Strand& strand : strands_) {
    if (strand.actor == actor) return strand;
  }
  strands_.emplace_back();
  strands_.back().actor = actor;
  return strands_.back();
}

void ComputePool::Submit(ActorId actor, std::function<absl::Status()> work, uint64_t tag) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Strand& strand = StrandOf(actor);
    strand.works.Push(Work{std::move(work), tag});
    if (strand.scheduled) return;
    strand.scheduled = true;
    ready_.Push(&strand);
  }
  wake_.notify_one();
}

void ComputePool::TakeCompletions(std::vector<ComputeCompletion>& out) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (ComputeCompletion& completion : completions_) out.push_back(std::move(completion));
  completions_.clear();
}

void ComputePool::ThreadMain() {
  SetComputeFloatMode();
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stopping_ || !ready_.empty(); });
    if (stopping_) return;
    Strand* strand = ready_.Pop();
    Work work = strand->works.Pop();
    lock.unlock();
    absl::Status status = work.run();
    work.run = nullptr;  // what it captured dies before the actor hears of it
    lock.lock();
    completions_.push_back(ComputeCompletion{strand->actor, work.tag, std::move(status)});
    if (strand->works.empty()) {
      strand->scheduled = false;
    } else {
      ready_.Push(strand);
      wake_.notify_one();
    }
    lock.unlock();
    on_completion_();
    lock.lock();
  }
}

}  // namespace moebius::runtime
