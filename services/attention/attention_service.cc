#include "services/attention/attention_service.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <future>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "services/attention/event_queue.h"
#include "services/common/finish_reason.h"
#include "services/common/grpc_status.h"
#include "services/common/process.h"

namespace moebius::services {
namespace {

constexpr std::chrono::milliseconds kCancelPoll(100);

}  // namespace

grpc::Status AttentionRpc::Generate(grpc::ServerContext* context,
                                    const v1::ResolvedRequest* request,
                                    grpc::ServerWriter<v1::WorkerToken>* writer) {
  using attention_worker::TokenEvent;
  const auto cancel = [this, id = RequestId(request->request())] {
    (void)node_->Post(runtime::kAttentionWorker, attention_worker::Cancel{id});
  };
  // Whoever reads too slowly is cut off where it stands, in the middle of a write too.
  auto queue = std::make_shared<EventQueue<TokenEvent>>(stream_lag_, [cancel, context] {
    cancel();
    context->TryCancel();
  });
  const auto close = absl::MakeCleanup([queue] { queue->Close(); });
  attention_worker::Submit submit;
  submit.request = RequestId(request->request());
  submit.prompt.assign(request->prompt().begin(), request->prompt().end());
  submit.sampling.temperature = request->temperature();
  submit.sampling.top_k = request->top_k();
  submit.sampling.top_p = request->top_p();
  submit.sampling.seed = request->seed();
  submit.max_tokens = request->max_tokens();
  submit.stop_strings.assign(request->stop().begin(), request->stop().end());
  submit.ignore_eos = request->ignore_eos();
  submit.deadline_ms = request->deadline_ms();
  submit.on_token = [queue](const TokenEvent& event) { queue->Push(event); };
  const absl::Status posted = node_->Post(runtime::kAttentionWorker, std::move(submit));
  if (!posted.ok()) return ToGrpc(posted);
  while (true) {
    const std::optional<TokenEvent> event = queue->Pop(kCancelPoll);
    if (context->IsCancelled() || queue->overflowed()) {
      cancel();
      return grpc::Status(grpc::StatusCode::CANCELLED, "the client is gone or does not read");
    }
    if (!event) continue;
    if (event->finish_reason == attention_worker::FinishReason::kError)
      return ToGrpc(event->status);
    v1::WorkerToken token;
    token.set_token_index(event->index);
    token.set_has_token(event->token >= 0);
    token.set_token_id(event->token);
    token.set_logprob(event->logprob);
    token.set_row_digest(event->row_digest);
    token.set_finish_reason(ToProto(event->finish_reason));
    token.set_preemptions(event->preemptions);
    if (!writer->Write(token)) {
      cancel();
      return grpc::Status(grpc::StatusCode::CANCELLED, "the client is gone");
    }
    // At a deadline the last event has the reason and the call the code.
    if (event->finish_reason != attention_worker::FinishReason::kNone) return ToGrpc(event->status);
  }
}

grpc::Status AttentionRpc::Score(grpc::ServerContext* context, const v1::ResolvedScore* request,
                                 v1::ScoreReply* reply) {
  struct Step {
    std::optional<attention_worker::ScoreEvent> score;
    std::optional<attention_worker::TokenEvent> end;
  };
  auto queue = std::make_shared<EventQueue<Step>>(size_t{1} << 20);
  attention_worker::Submit submit;
  submit.request = RequestId(request->request());
  submit.prompt.assign(request->prompt().begin(), request->prompt().end());
  submit.top_n = static_cast<uint32_t>(request->top());
  submit.deadline_ms = request->deadline_ms();
  submit.on_score = [queue](const attention_worker::ScoreEvent& event) {
    queue->Push(Step{event, std::nullopt});
  };
  submit.on_token = [queue](const attention_worker::TokenEvent& event) {
    queue->Push(Step{std::nullopt, event});
  };
  const absl::Status posted = node_->Post(runtime::kAttentionWorker, std::move(submit));
  if (!posted.ok()) return ToGrpc(posted);
  while (true) {
    const std::optional<Step> step = queue->Pop(kCancelPoll);
    if (context->IsCancelled() || queue->overflowed()) {
      (void)node_->Post(runtime::kAttentionWorker,
                        attention_worker::Cancel{RequestId(request->request())});
      return grpc::Status(grpc::StatusCode::CANCELLED, "the client is gone");
    }
    if (!step) continue;
    if (step->end) {
      // A score that succeeds ends with its last position.
      if (!step->end->status.ok()) return ToGrpc(step->end->status);
      return grpc::Status(grpc::StatusCode::INTERNAL, "the score ended before its last position");
    }
    v1::ScorePosition* position = reply->add_positions();
    position->set_next_logprob(step->score->next_logprob);
    position->set_row_digest(step->score->row_digest);
    for (TokenId id : step->score->top_ids) position->add_top_ids(id);
    for (float logprob : step->score->top_logprobs) position->add_top_logprob(logprob);
    if (step->score->last) return grpc::Status::OK;
  }
}

absl::StatusOr<std::unique_ptr<AttentionProcess>> AttentionProcess::Start(
    const ServiceFlags& flags) {
  RETURN_IF_ERROR(CheckWorkerBindPolicy(flags.listen, flags.data_address));
  std::unique_ptr<AttentionProcess> process(new AttentionProcess());
  ASSIGN_OR_RETURN(process->host_, OpenModel(flags.model));
  const ModelHost& host = *process->host_;
  RETURN_IF_ERROR(CheckLatentCache(host.config, flags.num_blocks));
  ASSIGN_OR_RETURN(process->weights_, LoadAttentionWeights(host));
  process->attention_backend_ = MakeBackend(flags.threads);
  process->router_backend_ = MakeBackend(1);
  ASSIGN_OR_RETURN(process->data_,
                   DataNode::Open(host, *process->attention_backend_, flags.data_address,
                                  flags.node, wire::NodeRole::kAttention));
  runtime::Node& node = process->data_->node();

  attention_worker::AttentionOptions options;
  options.router = {node.id(), runtime::kRouter};
  options.model_digest = host.manifest.digest64();
  options.max_step_tokens = static_cast<int32_t>(kMaxStepRows);
  options.prefill_chunk = flags.prefill_chunk;
  options.num_blocks = flags.num_blocks;
  options.max_running = flags.max_running;
  options.sampled_vocab = host.sampled_vocab();
  options.on_backend_failure = EndAfterFailure;
  RETURN_IF_ERROR(attention_worker::ValidateOptions(host.config, options));
  auto attention = std::make_unique<attention_worker::AttentionActor>(
      attention_worker::AttentionModel{&host.config, process->weights_.get(),
                                       process->attention_backend_.get(), host.tokenizer.get()},
      options);
  process->actor_ = attention.get();
  auto router = std::make_unique<router::RouterActor>(
      MakeRouterOptions(host.config, *process->weights_, kMaxStepRows),
      process->router_backend_.get());
  process->router_counters_ = router->counters();
  node.AddActor(runtime::kAttentionWorker, std::move(attention));
  node.AddActor(runtime::kRouter, std::move(router));
  process->data_->Start();

  process->rpc_ = std::make_unique<AttentionRpc>(&node, static_cast<size_t>(flags.stream_lag));
  process->status_ = std::make_unique<StatusServiceImpl>(
      "attention", node.id().value(), [raw = process.get()] { return raw->ReadCounters(); });
  ASSIGN_OR_RETURN(process->server_,
                   StartServer(flags.listen, {process->rpc_.get(), process->status_.get()}));
  v1::Worker self;
  self.set_node(node.id().value());
  self.set_incarnation(node.incarnation().value());
  self.set_role(v1::ROLE_ATTENTION);
  self.set_data_address(process->data_->address());
  self.set_grpc_address(process->server_.address);
  self.set_model_digest(model::ToHex(host.manifest.digest));
  self.set_numerics(process->attention_backend_->NumericsName());
  process->controller_ = std::make_unique<ControllerClient>(
      flags.controller, flags.listen, self,
      ControllerClient::Handlers{nullptr, [raw = process.get()](const v1::ClusterView& view) {
                                   return raw->OnView(view);
                                 }});
  process->controller_->Start();
  RETURN_IF_ERROR(PublishAddress(flags.port_file, process->server_.address));
  return process;
}

AttentionProcess::~AttentionProcess() = default;

absl::Status AttentionProcess::OnView(const v1::ClusterView& view) {
  if (view.hosts_size() > 0) {
    auto placement = std::make_shared<router::Placement>(
        Epoch(view.epoch()), static_cast<uint32_t>(host_->config.total_layers()),
        static_cast<uint32_t>(host_->config.n_routed_experts));
    for (const v1::ExpertHost& expert_host : view.hosts()) {
      const NodeId node(expert_host.node());
      placement->AddPeer(
          {node, Incarnation(expert_host.incarnation()), expert_host.data_address()});
      for (const v1::LayerExperts& layer : expert_host.experts()) {
        for (uint32_t expert : layer.experts()) {
          if (layer.layer() >= placement->layers() || expert >= placement->experts_per_layer()) {
            LOG_ERROR("placement names an expert that this model does not have");
            return absl::OkStatus();  // it would be no better the next time
          }
          placement->AddReplica(LayerId(layer.layer()), ExpertId(expert),
                                {node, runtime::kExpertWorker});
        }
      }
    }
    // A full mailbox must not cost us the epoch: the view comes again.
    RETURN_IF_ERROR(
        data_->node().Post(runtime::kRouter, router::PlacementUpdate{std::move(placement)}));
  }
  // A controller that has just started knows less than we do.
  complete_ = view.complete() || (!view.settled() && complete_);
  server_.SetServing(complete_);
  controller_->SetReady(complete_);
  return absl::OkStatus();
}

StatusServiceImpl::Counters AttentionProcess::ReadCounters() const {
  const attention_worker::AttentionCounters a = actor_->counters();
  const router::RouterCounters& r = *router_counters_;
  const runtime::SessionCounters s = data_->node().counters();
  return {{"steps", a.steps},
          {"rows", a.rows},
          {"tokens_out", a.tokens_out},
          {"requests", a.requests},
          {"refused", a.refused},
          {"preemptions", a.preemptions},
          {"running", a.running},
          {"waiting", a.waiting},
          {"blocks_used", a.blocks_used},
          {"blocks_total", a.blocks_total},
          {"route_resends", a.route_resends},
          {"router_items_sent", r.items_sent.load()},
          {"router_items_resent", r.items_resent.load()},
          {"router_items_hedged", r.items_hedged.load()},
          {"router_stale_answers", r.stale_answers.load()},
          {"exactness_mismatch_total", r.exactness_mismatches.load()},
          {"frames_sent", s.frames_sent},
          {"frames_received", s.frames_received},
          {"checksum_failures", s.checksum_failures}};
}

void AttentionProcess::Drain() {
  server_.StopServing();
  controller_->Leave();
  auto drained = std::make_shared<std::promise<void>>();
  std::future<void> done = drained->get_future();
  (void)data_->node().Post(runtime::kAttentionWorker,
                           attention_worker::Drain{[drained] { drained->set_value(); }});
  done.wait_for(std::chrono::seconds(30));
  controller_->Stop();
  server_.server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
  data_->Stop();
}

}  // namespace moebius::services
