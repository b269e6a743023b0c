#pragma once

// The attention worker: holds the embedding, attention, dense and shared-expert weights and the
// latent cache; schedules sequences into steps; runs each step layer by layer; draws tokens.
//
//   AttentionActor actor({.config = &config, .weights = &weights, .backend = backend.get(),
//                         .tokenizer = tokenizer}, options);
//   node.AddActor(runtime::kAttentionWorker, &actor);
//   node.Post(address, Submit{...});
//
// Receives (attention_worker/generation.h): Posted{Submit}, Posted{Cancel}, Posted{Ping},
// Posted{Drain}, Posted{RouterUpdate}; from the router kRouteReply frames. A step is one pass of up
// to max_step_tokens rows through all layers: compute runs beside the loop (Context::Submit), MoE
// rows go to the router (proto/wire/route.h) while the shared expert is computed. One step at a
// time.
//
// Exactness: each token is a function of the model and its own sequence (docs/exactness.md);
// batching, chunk size, preemption, the router's place and retries never reach the bits.
//
// Failure: the router may be lost, restarted or replaced at any time: the layer's rows are sent
// again. A compute error is final for the backend: everything aboard ends with kError and new
// requests are refused.
//
// Threading: an Actor (the node's loop thread), except counters(), which any thread may call. The
// pointers in AttentionModel are borrowed and must outlive the actor; `backend` is used by this
// actor's compute work alone. The actor must outlive the node's compute work.

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "attention_worker/attention_options.h"
#include "attention_worker/generation.h"
#include "kernels/backend.h"
#include "runtime/actor.h"

namespace moebius::model {
struct ModelConfig;
struct AttentionWorkerWeights;
class Tokenizer;
}  // namespace moebius::model

namespace moebius::attention_worker {

struct AttentionModel {
  const model::ModelConfig* config = nullptr;
  const model::AttentionWorkerWeights* weights = nullptr;
  kernels::Backend* backend = nullptr;
  const model::Tokenizer* tokenizer = nullptr;  // only for stop strings; may be nullptr
};

class AttentionActor final : public runtime::Actor {
 public:
  // REQUIRES: ValidateOptions(*model.config, options).ok(). Allocates the cache and all buffers.
  AttentionActor(const AttentionModel& model, const AttentionOptions& options);
  ~AttentionActor() override;

  void Start(runtime::Context& context) override;
  void Receive(runtime::Message message, runtime::Context& context) override;

  // Any thread.
  AttentionCounters counters() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moebius::attention_worker
