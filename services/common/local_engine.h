#pragma once

// A whole cluster in one process and one node: the same actors as in separate processes, frames
// handed over in memory. Behind `moebius generate|chat|score` without --address, and the yardstick
// of the real cluster.
//
// Threading: Generate and Score may be called from several threads at once.

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "attention_worker/attention_actor.h"
#include "attention_worker/generation.h"
#include "runtime/node.h"
#include "services/common/model_host.h"
#include "services/common/steady_clock.h"

namespace moebius::services {

struct LocalEngineOptions {
  int experts = 1;  // in-process expert workers
  int threads = 1;  // of the attention backend
  int prefill_chunk = 128;
  int num_blocks = 0;  // 0: enough for one sequence of full context, 64 at least
  int max_running = 64;
};

struct GenerationResult {
  std::vector<attention_worker::TokenEvent> events;  // each with a token
  attention_worker::FinishReason finish_reason = attention_worker::FinishReason::kNone;
  uint32_t preemptions = 0;
};

class LocalEngine {
 public:
  static absl::StatusOr<std::unique_ptr<LocalEngine>> Open(const std::string& model_dir,
                                                           const LocalEngineOptions& options);
  ~LocalEngine();

  // Fills in the request number. `on_token` (may be empty) runs on the loop thread and must not
  // block.
  absl::StatusOr<GenerationResult> Generate(
      attention_worker::Submit request,
      std::function<void(const attention_worker::TokenEvent&)> on_token);
  // Ends a request (its events name it) with CANCELLED. One that has ended is no concern.
  void Cancel(RequestId request);
  // `deadline_ms`: 0 is none.
  absl::StatusOr<std::vector<attention_worker::ScoreEvent>> Score(std::vector<TokenId> ids,
                                                                  uint32_t top,
                                                                  int64_t deadline_ms = 0);

  const ModelHost& host() const { return *host_; }
  attention_worker::AttentionCounters counters() const { return attention_->counters(); }

 private:
  LocalEngine() = default;

  std::unique_ptr<ModelHost> host_;
  std::unique_ptr<model::AttentionWorkerWeights> weights_;
  std::vector<std::unique_ptr<kernels::Backend>> backends_;
  SteadyClock clock_;
  std::unique_ptr<runtime::BufferPool> pool_;
  std::unique_ptr<runtime::Transport> transport_;
  std::unique_ptr<runtime::Node> node_;
  attention_worker::AttentionActor* attention_ = nullptr;  // owned by the node
  std::atomic<uint64_t> next_request_{1};
  std::thread loop_;
};

}  // namespace moebius::services
