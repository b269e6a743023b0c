#include "services/common/local_engine.h"

#include <algorithm>
#include <future>
#include <utility>

#include "base/status_macros.h"
#include "router/router_actor.h"
#include "runtime/local_transport.h"
#include "services/common/buffer_classes.h"

namespace moebius::services {

absl::StatusOr<std::unique_ptr<LocalEngine>> LocalEngine::Open(const std::string& model_dir,
                                                               const LocalEngineOptions& options) {
  std::unique_ptr<LocalEngine> engine(new LocalEngine());
  ASSIGN_OR_RETURN(engine->host_, OpenModel(model_dir));
  const ModelHost& host = *engine->host_;
  ASSIGN_OR_RETURN(engine->weights_, LoadAttentionWeights(host));
  const auto backend = [&](int threads) {
    engine->backends_.push_back(MakeBackend(threads));
    return engine->backends_.back().get();
  };
  kernels::Backend* attention_backend = backend(options.threads);
  engine->pool_ = std::make_unique<runtime::BufferPool>(
      MakeBufferClasses(host.config, kMaxStepRows, static_cast<uint32_t>(options.experts)));
  engine->transport_ = std::make_unique<runtime::LocalTransport>();
  runtime::NodeOptions node_options;
  node_options.identity = MakeIdentity(host, *attention_backend, FreshNodeId(), FreshIncarnation(),
                                       wire::NodeRole::kAttention);
  node_options.compute_threads = 2;
  engine->node_ = std::make_unique<runtime::Node>(node_options, *engine->transport_, engine->clock_,
                                                  *engine->pool_);
  runtime::Node& node = *engine->node_;

  attention_worker::AttentionOptions attention;
  attention.router = {node.id(), runtime::kRouter};
  attention.model_digest = host.manifest.digest64();
  attention.max_step_tokens = static_cast<int32_t>(kMaxStepRows);
  attention.prefill_chunk = options.prefill_chunk;
  attention.max_running = options.max_running;
  const int64_t one_sequence = (host.config.max_position_embeddings + 63) / 64;
  attention.num_blocks = options.num_blocks > 0
                             ? options.num_blocks
                             : static_cast<int32_t>(std::clamp<int64_t>(one_sequence, 64, 4096));
  attention.sampled_vocab = host.sampled_vocab();
  RETURN_IF_ERROR(attention_worker::ValidateOptions(host.config, attention));
  RETURN_IF_ERROR(CheckLatentCache(host.config, attention.num_blocks));
  auto actor = std::make_unique<attention_worker::AttentionActor>(
      attention_worker::AttentionModel{&host.config, engine->weights_.get(), attention_backend,
                                       host.tokenizer.get()},
      attention);
  engine->attention_ = actor.get();
  node.AddActor(runtime::kAttentionWorker, std::move(actor));
  node.AddActor(runtime::kRouter,
                std::make_unique<router::RouterActor>(
                    MakeRouterOptions(host.config, *engine->weights_, kMaxStepRows), backend(1)));
  const auto expert_actor = [&](int worker) {
    return ActorId(static_cast<uint16_t>(runtime::kExpertWorker.value() + worker));
  };
  for (int worker = 0; worker < options.experts; ++worker) {
    node.AddActor(expert_actor(worker),
                  std::make_unique<expert_worker::ExpertActor>(
                      MakeExpertOptions(host.config, kMaxStepRows), backend(1)));
  }
  // Experts are dealt out one by one: any number of workers, and gate groups are split on purpose.
  auto placement = std::make_shared<router::Placement>(
      Epoch(1), static_cast<uint32_t>(host.config.total_layers()),
      static_cast<uint32_t>(host.config.n_routed_experts));
  for (int64_t l = 0; l < host.config.num_hidden_layers; ++l) {
    if (!host.config.is_moe_layer(l)) continue;
    const LayerId layer(static_cast<uint32_t>(l));
    for (int worker = 0; worker < options.experts; ++worker) {
      std::vector<ExpertId> experts;
      for (int64_t e = worker; e < host.config.n_routed_experts; e += options.experts) {
        experts.push_back(ExpertId(static_cast<uint32_t>(e)));
        placement->AddReplica(layer, experts.back(), {node.id(), expert_actor(worker)});
      }
      if (experts.empty()) continue;
      ASSIGN_OR_RETURN(expert_worker::HostExperts hosts, LoadExperts(host, layer, experts));
      RETURN_IF_ERROR(node.Post(expert_actor(worker), std::move(hosts)));
    }
  }
  RETURN_IF_ERROR(node.Post(runtime::kRouter, router::PlacementUpdate{std::move(placement)}));
  engine->loop_ = std::thread([raw = engine.get()] { raw->node_->Run(); });
  return engine;
}

LocalEngine::~LocalEngine() {
  if (loop_.joinable()) {
    node_->Stop();
    loop_.join();
  }
}

absl::StatusOr<GenerationResult> LocalEngine::Generate(
    attention_worker::Submit request,
    std::function<void(const attention_worker::TokenEvent&)> on_token) {
  using attention_worker::FinishReason;
  using attention_worker::TokenEvent;
  struct Shared {
    GenerationResult result;
    absl::Status status;
    std::promise<void> done;
  };
  auto shared = std::make_shared<Shared>();
  request.request = RequestId(next_request_.fetch_add(1));
  request.on_token = [shared, on_token](const TokenEvent& event) {
    if (event.token >= 0) {
      shared->result.events.push_back(event);
      if (on_token) on_token(event);
    }
    if (event.finish_reason == FinishReason::kNone) return;
    shared->result.finish_reason = event.finish_reason;
    shared->result.preemptions = event.preemptions;
    shared->status = event.status;
    shared->done.set_value();
  };
  RETURN_IF_ERROR(node_->Post(runtime::kAttentionWorker, std::move(request)));
  shared->done.get_future().wait();
  RETURN_IF_ERROR(shared->status);
  return std::move(shared->result);
}

void LocalEngine::Cancel(RequestId request) {
  (void)node_->Post(runtime::kAttentionWorker, attention_worker::Cancel{request});
}

absl::StatusOr<std::vector<attention_worker::ScoreEvent>> LocalEngine::Score(
    std::vector<TokenId> ids, uint32_t top, int64_t deadline_ms) {
  struct Shared {
    std::vector<attention_worker::ScoreEvent> scores;
    absl::Status status;
    std::promise<void> done;
    bool ended = false;
  };
  auto shared = std::make_shared<Shared>();
  attention_worker::Submit request;
  request.request = RequestId(next_request_.fetch_add(1));
  request.prompt = std::move(ids);
  request.top_n = top;
  request.deadline_ms = deadline_ms;
  const auto end = [shared](absl::Status status) {
    if (shared->ended) return;
    shared->ended = true;
    shared->status = std::move(status);
    shared->done.set_value();
  };
  request.on_score = [shared, end](const attention_worker::ScoreEvent& event) {
    shared->scores.push_back(event);
    if (event.last) end(absl::OkStatus());
  };
  request.on_token = [end](const attention_worker::TokenEvent& event) {
    if (!event.status.ok()) end(event.status);
  };
  RETURN_IF_ERROR(node_->Post(runtime::kAttentionWorker, std::move(request)));
  shared->done.get_future().wait();
  RETURN_IF_ERROR(shared->status);
  return std::move(shared->scores);
}

}  // namespace moebius::services
