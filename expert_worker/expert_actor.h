#pragma once

// The expert worker: hosts a set of (layer, expert) shards, takes whatever rows have arrived when
// it is free, runs one grouped FFN over them and answers each sender with its rows. It keeps
// nothing of a request: an answer is a pure function of the row and the expert, so asking twice, or
// another replica, is always right.
//
// Receives: kDispatch frames (proto/wire/dispatch.h); Posted{HostExperts}, Posted{DropExperts},
// Posted{Drain}.
//
// Bounds: at most `max_queued_frames` dispatch frames wait (the credits of all sessions, by
// construction); one batch of up to `max_batch_items` pairs computes; answers that cannot leave yet
// wait in order. Over the bound a frame is dropped and counted: its sender asks again. After
// warm-up a batch allocates nothing.
//
// Threading: an Actor; counters() may be read from any thread.

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/ids.h"
#include "kernels/backend.h"
#include "proto/wire/dispatch.h"
#include "runtime/actor.h"

namespace moebius::expert_worker {

struct ExpertOptions {
  wire::RowLimits limits;
  int64_t intermediate = 0;          // moe_intermediate_size
  bool power_of_two_scales = false;  // of the requantised SwiGLU output (e4m3 rows)
  uint32_t max_batch_items = 4096;
  uint32_t max_queued_frames = 1024;
  // Called once, on the node's loop, when the backend has failed for good: from then on the worker
  // hosts nothing, and says so to whoever asks. May be empty.
  std::function<void(const absl::Status&)> on_backend_failure;
};

struct HostedExpert {
  LayerId layer;
  ExpertId expert;
  kernels::ExpertWeights weights;
};

// Posted: start hosting. `owner` keeps the weights' memory; it is released once its experts were
// dropped.
struct HostExperts {
  std::vector<HostedExpert> experts;
  std::shared_ptr<const void> owner;
};

// Posted: stop hosting; rows that arrive for them are answered with kNotHosted. Takes effect
// between batches.
struct DropExperts {
  std::vector<std::pair<LayerId, ExpertId>> experts;
};

// Posted: `on_drained` runs (on the loop thread) once nothing is queued, computing or waiting to
// leave. Rows that still arrive are served.
struct Drain {
  std::function<void()> on_drained;
};

struct ExpertCounters {
  std::atomic<uint64_t> items_served{0};  // (row, expert) pairs computed and answered
  std::atomic<uint64_t> rows_received{0};
  std::atomic<uint64_t> batches{0};
  std::atomic<uint64_t> not_hosted{0};
  std::atomic<uint64_t> refused_frames{0};  // malformed or over the bound
  std::atomic<uint64_t> experts_hosted{0};
};

class ExpertActor final : public runtime::Actor {
 public:
  // `backend` is used by this actor's compute alone and must outlive it.
  ExpertActor(ExpertOptions options, kernels::Backend* backend);
  ~ExpertActor() override;
  void Receive(runtime::Message message, runtime::Context& context) override;
  // Shared, so that a metrics endpoint may outlive the actor.
  std::shared_ptr<const ExpertCounters> counters() const { return counters_; }

 private:
  struct Hosted {
    kernels::ExpertWeights weights;
    std::shared_ptr<const void> owner;
    bool present = false;
  };
  struct Queued {
    runtime::ActorAddress from;
    runtime::Frame frame;
  };
  // One pair of the batch being computed, in the order of the grouped FFN.
  struct BatchItem {
    uint32_t hosted;    // index into hosted_
    uint32_t frame;     // index into batch_
    uint32_t position;  // of the item within its frame
    uint32_t source;    // row of the gathered input
  };
  struct Outgoing {
    runtime::ActorAddress to;
    runtime::Frame frame;
  };

  uint32_t HostedIndex(uint32_t layer, uint32_t expert) const {
    return layer * options_.limits.experts_per_layer + expert;
  }
  void OnDispatch(runtime::FrameReceived received);
  void ApplyHosting();
  void FailBackend(const absl::Status& status);
  void StartBatch(runtime::Context& context);
  void PlanBatch();
  absl::Status Compute();
  void Answer(runtime::Context& context);
  // Builds answers of batch_ from `answered_` on until buffers run out; true when all are built.
  bool BuildAnswers(runtime::Context& context);
  void Flush(runtime::Context& context);
  void CheckDrained();

  const ExpertOptions options_;
  kernels::Backend* const backend_;
  std::shared_ptr<ExpertCounters> counters_;
  std::vector<Hosted> hosted_;
  std::vector<HostExperts> hosting_;  // orders that wait for the running batch
  std::vector<DropExperts> dropping_;
  std::vector<Queued> queue_;
  size_t queue_head_ = 0;

  bool failed_ = false;
  bool computing_ = false;
  bool answering_ = false;  // a computed batch whose answers are not all built
  size_t answered_ = 0;
  std::vector<Queued> batch_;
  std::vector<wire::DispatchView> views_;
  std::vector<BatchItem> items_;
  std::vector<uint32_t> item_row_;   // [items of all frames] packed output row, or kNotHere
  std::vector<uint32_t> item_base_;  // [frames] first item of the frame in item_row_
  std::vector<kernels::ExpertGroup> groups_;
  std::vector<int32_t> row_index_;
  std::vector<E4m3> codes_;
  std::vector<float> scales_;
  std::vector<Bf16> rows_;
  std::vector<Bf16> out_;
  int64_t gathered_rows_ = 0;
  std::vector<Outgoing> outgoing_;
  std::vector<std::function<void()>> drains_;
};

}  // namespace moebius::expert_worker
