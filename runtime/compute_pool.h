#pragma once

// Threads beside a node's loop that run what actors Submit. Works of one actor run one after
// another in the order of submission (a strand); works of different actors may run at the same
// time. A finished work is queued as a completion, which the loop takes with TakeCompletions.
//
// Every thread runs with the floating-point mode of the row rule: round to nearest, denormals kept.

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "base/ids.h"
#include "runtime/ring.h"

namespace moebius::runtime {

struct ComputeCompletion {
  ActorId actor;
  uint64_t tag = 0;
  absl::Status status;
};

class ComputePool {
 public:
  // Works an actor may have outstanding; more is a bug of the actor (CHECKed).
  static constexpr size_t kMaxWorksPerActor = 64;

  // `on_completion` runs on a compute thread after a completion was queued (it wakes the loop).
  ComputePool(int threads, std::function<void()> on_completion);
  // Runs nothing more; waits for the works that run now.
  ~ComputePool();

  void Submit(ActorId actor, std::function<absl::Status()> work, uint64_t tag);
  // Appends finished works in the order in which they finished.
  void TakeCompletions(std::vector<ComputeCompletion>& out);

 private:
  struct Work {
    std::function<absl::Status()> run;
    uint64_t tag = 0;
  };
  struct Strand {
    ActorId actor;
    Ring<Work> works{kMaxWorksPerActor};
    bool scheduled = false;  // in ready_ or running
  };
  void ThreadMain();
  Strand& StrandOf(ActorId actor);

  const std::function<void()> on_completion_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Strand> strands_;  // deque: references stay valid
  Ring<Strand*> ready_{1024};
  std::vector<ComputeCompletion> completions_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// Sets round-to-nearest and clears flush-to-zero / denormals-are-zero on the calling thread.
void SetComputeFloatMode();

}  // namespace moebius::runtime
