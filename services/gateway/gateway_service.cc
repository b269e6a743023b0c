#include "services/gateway/gateway_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/process.h"

namespace moebius::services {
namespace {

// A worker ends a request at its deadline and says so. One that has stopped says nothing: then the
// call to it ends so much later, and with it the request's place here.
constexpr std::chrono::seconds kDeadlineGrace(2);

// The worker's call: ends with the client's, at the client's gRPC deadline, or when the request's
// own has passed and the worker does not answer.
std::unique_ptr<grpc::ClientContext> Upstream(const grpc::ServerContext& client,
                                              int64_t deadline_ms) {
  std::unique_ptr<grpc::ClientContext> context = grpc::ClientContext::FromServerContext(client);
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(deadline_ms) +
                        kDeadlineGrace);
  return context;
}

// What the client calls the request.
std::string IdOf(const std::string& chosen, uint64_t number) {
  return chosen.empty() ? absl::StrCat("req-", absl::Hex(number)) : chosen;
}

}  // namespace

class Gateway::Ticket {
 public:
  Ticket(Gateway& gateway, uint64_t node, std::shared_ptr<v1::AttentionService::Stub> stub)
      : gateway_(gateway), node_(node), stub_(std::move(stub)) {}
  ~Ticket() {
    std::lock_guard<std::mutex> lock(gateway_.mutex_);
    --gateway_.in_flight_;
    if (const auto it = gateway_.backends_.find(node_); it != gateway_.backends_.end())
      --it->second.in_flight;
    gateway_.idle_.notify_all();
  }
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;
  v1::AttentionService::Stub& stub() { return *stub_; }

 private:
  Gateway& gateway_;
  const uint64_t node_;
  const std::shared_ptr<v1::AttentionService::Stub> stub_;
};

absl::StatusOr<std::unique_ptr<Gateway>> Gateway::Start(const ServiceFlags& flags) {
  std::unique_ptr<Gateway> gateway(new Gateway());
  ASSIGN_OR_RETURN(gateway->host_, OpenModel(flags.model));
  gateway->limits_.max_context = gateway->host_->config.max_position_embeddings;
  gateway->limits_.default_deadline_ms = flags.default_deadline_ms;
  gateway->credentials_ = flags.listen;
  gateway->max_in_flight_ = flags.max_in_flight;
  gateway->writes_ = std::make_unique<StallWatch>(std::chrono::milliseconds(flags.write_stall_ms));
  // Request numbers of two gateways, or of one that restarted, must not meet in a worker.
  gateway->next_request_ = FreshNodeId() << 20 | 1;
  gateway->status_ = std::make_unique<StatusServiceImpl>(
      "gateway", 0, [raw = gateway.get()] { return raw->ReadCounters(); });
  ASSIGN_OR_RETURN(gateway->server_,
                   StartServer(flags.listen, {gateway.get(), gateway->status_.get()}));
  gateway->controller_ = std::make_unique<ControllerClient>(
      flags.controller, flags.listen, v1::Worker(),
      ControllerClient::Handlers{nullptr, [raw = gateway.get()](const v1::ClusterView& view) {
                                   raw->OnView(view);
                                   return absl::OkStatus();
                                 }});
  gateway->controller_->Start();
  RETURN_IF_ERROR(PublishAddress(flags.port_file, gateway->server_.address));
  return gateway;
}

Gateway::~Gateway() = default;

void Gateway::OnView(const v1::ClusterView& view) {
  std::lock_guard<std::mutex> lock(mutex_);
  // A controller that has just started knows less than we do: what it does not list yet stays.
  complete_ = view.complete() || (!view.settled() && complete_);
  view_ = view;
  if (view.settled()) {
    for (auto& [node, backend] : backends_) backend.ready = false;
  }
  for (const v1::Worker& worker : view.workers()) {
    if (worker.role() != v1::ROLE_ATTENTION) continue;
    Backend& backend = backends_[worker.node()];
    if (backend.address != worker.grpc_address()) {
      backend.address = worker.grpc_address();
      backend.stub = v1::AttentionService::NewStub(MakeChannel(backend.address, credentials_));
    }
    backend.ready = worker.ready();
  }
  std::erase_if(backends_, [](const auto& entry) {
    return !entry.second.ready && entry.second.in_flight == 0;
  });
  const bool any = std::any_of(backends_.begin(), backends_.end(),
                               [](const auto& entry) { return entry.second.ready; });
  // Ready means: a token can be made now.
  server_.SetServing(any && complete_ && !draining_);
}

StatusServiceImpl::Counters Gateway::ReadCounters() {
  v1::ClusterView view;
  StatusServiceImpl::Counters counters{{"requests", requests_.load()},
                                       {"tokens_out", tokens_.load()},
                                       {"refused", refused_.load()},
                                       {"slow_clients_cut", slow_clients_.load()}};
  {
    std::lock_guard<std::mutex> lock(mutex_);
    view = view_;
    bool ready = false;
    for (const auto& [node, backend] : backends_) ready = ready || backend.ready;
    counters["ready"] = ready && complete_ && !draining_ ? 1 : 0;
    counters["in_flight"] = static_cast<uint64_t>(in_flight_);
  }
  counters["placement_epoch"] = view.epoch();
  counters["controller_settled"] = view.settled() ? 1 : 0;
  counters["expert_workers_ready"] = 0;
  counters["attention_workers_ready"] = 0;
  for (const v1::Worker& worker : view.workers()) {
    const bool expert = worker.role() == v1::ROLE_EXPERT;
    if (worker.ready()) ++counters[expert ? "expert_workers_ready" : "attention_workers_ready"];
    auto stub = v1::StatusService::NewStub(MakeChannel(worker.grpc_address(), credentials_));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(500));
    v1::StatusReply reply;
    if (!stub->Status(&context, v1::StatusRequest(), &reply).ok()) continue;
    for (const v1::Counter& counter : reply.counters()) {
      counters[absl::StrCat(reply.role(), "/", worker.node(), "/", counter.name())] =
          counter.value();
    }
  }
  return counters;
}

absl::StatusOr<std::unique_ptr<Gateway::Ticket>> Gateway::Admit() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (draining_) return absl::UnavailableError("the gateway is draining");
  if (in_flight_ >= max_in_flight_) {
    ++refused_;
    return absl::ResourceExhaustedError(
        absl::StrCat("too many requests in flight, limit ", max_in_flight_));
  }
  auto best = backends_.end();
  for (auto it = backends_.begin(); it != backends_.end(); ++it) {
    if (!it->second.ready) continue;
    if (best == backends_.end() || it->second.in_flight < best->second.in_flight) best = it;
  }
  if (best == backends_.end()) return absl::UnavailableError("no attention worker is ready");
  ++in_flight_;
  ++best->second.in_flight;
  return std::make_unique<Ticket>(*this, best->first, best->second.stub);
}

grpc::Status Gateway::Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                               grpc::ServerWriter<v1::GenerateEvent>* writer) {
  absl::StatusOr<v1::ResolvedRequest> resolved = ResolveGenerate(*host_, limits_, *request);
  if (!resolved.ok()) return ToGrpc(resolved.status());
  absl::StatusOr<std::unique_ptr<Ticket>> ticket = Admit();
  if (!ticket.ok()) return ToGrpc(ticket.status());
  ++requests_;
  const uint64_t number = next_request_.fetch_add(1);
  const std::string id = IdOf(request->request_id(), number);
  resolved->set_request(number);
  const std::unique_ptr<grpc::ClientContext> upstream = Upstream(*context, resolved->deadline_ms());
  auto reader = (*ticket)->stub().Generate(upstream.get(), *resolved);
  StallWatch::Stream watched(*writes_, [this, context, id] {
    ++slow_clients_;
    LOG_WARNING(absl::StrCat("request ", id, ": the client does not read, cut off"));
    context->TryCancel();
  });
  std::unique_ptr<model::StreamDecoder> decoder;
  if (host_->tokenizer != nullptr) {
    decoder = std::make_unique<model::StreamDecoder>(*host_->tokenizer, /*skip_special=*/true);
  }
  uint64_t completion_tokens = 0;
  v1::WorkerToken token;
  bool ended = false;
  while (reader->Read(&token)) {
    v1::GenerateEvent event;
    event.set_request_id(id);
    event.set_token_index(token.token_index());
    event.set_has_token(token.has_token());
    event.set_finish_reason(token.finish_reason());
    ended = token.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
    if (token.has_token()) {
      ++completion_tokens;
      ++tokens_;
      event.set_token_id(token.token_id());
      event.set_logprob(token.logprob());
      event.set_row_digest(token.row_digest());
      if (decoder != nullptr) event.set_text(decoder->Append(token.token_id()));
    }
    if (ended) {
      if (decoder != nullptr) event.mutable_text()->append(decoder->Finish());
      event.mutable_usage()->set_prompt_tokens(static_cast<uint64_t>(resolved->prompt_size()));
      event.mutable_usage()->set_completion_tokens(completion_tokens);
      event.mutable_usage()->set_preemptions(token.preemptions());
    }
    watched.Begin();
    const bool written = writer->Write(event);
    watched.End();
    if (!written) {
      upstream->TryCancel();
      break;
    }
  }
  const grpc::Status status = reader->Finish();
  if (!status.ok()) return status;
  return ended ? grpc::Status::OK
               : grpc::Status(grpc::StatusCode::UNAVAILABLE, "the stream broke off");
}

grpc::Status Gateway::Score(grpc::ServerContext* context, const v1::ScoreRequest* request,
                            v1::ScoreReply* reply) {
  absl::StatusOr<v1::ResolvedScore> resolved = ResolveScore(*host_, limits_, *request);
  if (!resolved.ok()) return ToGrpc(resolved.status());
  absl::StatusOr<std::unique_ptr<Ticket>> ticket = Admit();
  if (!ticket.ok()) return ToGrpc(ticket.status());
  ++requests_;
  const uint64_t number = next_request_.fetch_add(1);
  resolved->set_request(number);
  const std::unique_ptr<grpc::ClientContext> upstream = Upstream(*context, resolved->deadline_ms());
  const grpc::Status status = (*ticket)->stub().Score(upstream.get(), *resolved, reply);
  reply->set_request_id(IdOf(request->request_id(), number));
  return status;
}

grpc::Status Gateway::Tokenize(grpc::ServerContext*, const v1::TokenizeRequest* request,
                               v1::TokenizeReply* reply) {
  const absl::StatusOr<std::vector<TokenId>> ids = ResolveTokenize(*host_, *request);
  if (!ids.ok()) return ToGrpc(ids.status());
  reply->mutable_token_ids()->Add(ids->begin(), ids->end());
  return grpc::Status::OK;
}

grpc::Status Gateway::ListModels(grpc::ServerContext*, const v1::ListModelsRequest*,
                                 v1::ListModelsReply* reply) {
  v1::ModelInfo* model = reply->add_models();
  model->set_id(host_->id);
  model->set_digest(model::ToHex(host_->manifest.digest));
  model->set_max_context(limits_.max_context);
  model->set_vocab_size(host_->config.vocab_size);
  model->set_has_tokenizer(host_->tokenizer != nullptr);
  return grpc::Status::OK;
}

void Gateway::Drain() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    draining_ = true;
    server_.StopServing();
    idle_.wait_for(lock, std::chrono::seconds(30), [this] { return in_flight_ == 0; });
  }
  controller_->Stop();
  server_.server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
}

}  // namespace moebius::services
