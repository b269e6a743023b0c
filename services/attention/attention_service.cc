#include "services/attention/attention_service.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <functional>
#include <future>
#include <optional>
#include <variant>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "services/attention/event_queue.h"
#include "services/common/grpc_status.h"
#include "services/common/process.h"
#include "services/common/worker_messages.h"

namespace moebius::services {
namespace {

// A stream that has nothing else to say says so often that its worker is alive.
constexpr std::chrono::milliseconds kBeatPeriod(100);

// One request's events from the node's loop to the stream's thread, with beats among them: those
// too come from the loop, so a worker whose loop hangs has none. The first beat comes before the
// request is posted: once its client has it, a death may be the request's doing, and never before.
template <typename Event>
class RequestEvents {
 public:
  // `ending`: set once this process ends, whatever is aboard.
  RequestEvents(runtime::Node* node, RequestId request, size_t limit, grpc::ServerContext* context,
                const std::atomic<bool>* ending)
      : node_(node), request_(request), context_(context), ending_(ending) {
    // Whoever reads too slowly is cut off where it stands, in the middle of a write too.
    queue_ = std::make_shared<Queue>(limit, [node, request, context] {
      (void)node->Post(runtime::kAttentionWorker, attention_worker::Cancel{request});
      context->TryCancel();
    });
    Ping();
  }
  ~RequestEvents() { queue_->Close(); }
  RequestEvents(const RequestEvents&) = delete;
  RequestEvents& operator=(const RequestEvents&) = delete;

  // A sink for the actor; outlives this object.
  std::function<void(const Event&)> Sink() const {
    return [queue = queue_](const Event& event) { queue->Push(event); };
  }
  // Behind a beat that has been written. Only the first call posts anything.
  absl::Status SubmitOnce(attention_worker::Submit& submit) {
    if (submitted_) return absl::OkStatus();
    submitted_ = true;
    return node_->Post(runtime::kAttentionWorker, std::move(submit));
  }
  // The next event, or nullopt for a beat. CANCELLED when nobody listens any more, ABORTED when
  // this process ends: the request has been cancelled then.
  absl::StatusOr<std::optional<Event>> Next() {
    while (true) {
      std::optional<std::optional<Event>> item = queue_->Pop(kBeatPeriod);
      if (context_->IsCancelled() || queue_->overflowed()) {
        Cancel();
        return absl::CancelledError("the client is gone or does not read");
      }
      if (*ending_) {
        Cancel();
        return absl::AbortedError("this worker ends");
      }
      if (!item) {
        if (!pinged_) Ping();
        continue;
      }
      if (!*item) pinged_ = false;
      return *std::move(item);
    }
  }
  void Cancel() {
    (void)node_->Post(runtime::kAttentionWorker, attention_worker::Cancel{request_});
  }

 private:
  using Queue = EventQueue<std::optional<Event>>;  // nullopt: a beat
  void Ping() {
    attention_worker::Ping ping{[queue = queue_] { queue->Push(std::nullopt); }};
    pinged_ = node_->Post(runtime::kAttentionWorker, std::move(ping)).ok();
  }

  runtime::Node* const node_;
  const RequestId request_;
  grpc::ServerContext* const context_;
  const std::atomic<bool>* const ending_;
  std::shared_ptr<Queue> queue_;
  bool pinged_ = false;
  bool submitted_ = false;
};

}  // namespace

grpc::Status AttentionRpc::Generate(grpc::ServerContext* context,
                                    const v1::ResolvedRequest* request,
                                    grpc::ServerWriter<v1::WorkerToken>* writer) {
  using attention_worker::TokenEvent;
  RequestEvents<TokenEvent> events(node_, RequestId(request->request()), stream_lag_, context,
                                   &ending_);
  attention_worker::Submit submit = ToSubmit(*request);
  submit.on_token = events.Sink();
  while (true) {
    const absl::StatusOr<std::optional<TokenEvent>> event = events.Next();
    if (!event.ok()) return ToGrpc(event.status());
    v1::WorkerToken token;
    if (!*event) {
      token.set_beat(true);
    } else if ((*event)->finish_reason == attention_worker::FinishReason::kError) {
      return ToGrpc((*event)->status);
    } else {
      token = ToProto(**event);
    }
    if (!writer->Write(token)) {
      events.Cancel();
      return grpc::Status(grpc::StatusCode::CANCELLED, "the client is gone");
    }
    if (absl::Status posted = events.SubmitOnce(submit); !posted.ok()) return ToGrpc(posted);
    // At a deadline the last event has the reason and the call the code.
    if (token.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) return ToGrpc((*event)->status);
  }
}

grpc::Status AttentionRpc::Score(grpc::ServerContext* context, const v1::ResolvedScore* request,
                                 grpc::ServerWriter<v1::WorkerScore>* writer) {
  using attention_worker::ScoreEvent;
  using attention_worker::TokenEvent;
  using Step = std::variant<ScoreEvent, TokenEvent>;  // a TokenEvent: it ended without its scores
  // The scores of a whole context may be there before the first of them is written.
  constexpr size_t kScoreLag = size_t{1} << 20;
  RequestEvents<Step> events(node_, RequestId(request->request()), kScoreLag, context, &ending_);
  attention_worker::Submit submit;
  submit.request = RequestId(request->request());
  submit.prompt.assign(request->prompt().begin(), request->prompt().end());
  submit.top_n = static_cast<uint32_t>(request->top());
  submit.deadline_ms = request->deadline_ms();
  submit.on_score = [sink = events.Sink()](const ScoreEvent& event) { sink(event); };
  submit.on_token = [sink = events.Sink()](const TokenEvent& event) { sink(event); };
  while (true) {
    const absl::StatusOr<std::optional<Step>> step = events.Next();
    if (!step.ok()) return ToGrpc(step.status());
    v1::WorkerScore message;
    const ScoreEvent* score = nullptr;
    if (!*step) {
      message.set_beat(true);
    } else if (const auto* end = std::get_if<TokenEvent>(&**step)) {
      return ToGrpc(end->status.ok()
                        ? absl::InternalError("the score ended before its last position")
                        : end->status);
    } else {
      score = &std::get<ScoreEvent>(**step);
      v1::ScorePosition& position = *message.mutable_position();
      position.set_next_logprob(score->next_logprob);
      position.set_row_digest(score->row_digest);
      position.mutable_top_ids()->Add(score->top_ids.begin(), score->top_ids.end());
      position.mutable_top_logprob()->Add(score->top_logprobs.begin(), score->top_logprobs.end());
    }
    if (!writer->Write(message)) {
      events.Cancel();
      return grpc::Status(grpc::StatusCode::CANCELLED, "the client is gone");
    }
    if (absl::Status posted = events.SubmitOnce(submit); !posted.ok()) return ToGrpc(posted);
    if (score != nullptr && score->last) return grpc::Status::OK;
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
  if (done.wait_for(std::chrono::seconds(30)) != std::future_status::ready) {
    // Others go on with what is still aboard.
    rpc_->EndStreams();
  }
  controller_->Stop();
  server_.server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
  data_->Stop();
}

}  // namespace moebius::services
