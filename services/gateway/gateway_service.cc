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
namespace {}  // namespace

class Gateway::Place {
 public:
  explicit Place(Gateway& gateway) : gateway_(gateway) {}
  ~Place() {
    std::lock_guard<std::mutex> lock(gateway_.mutex_);
    --gateway_.in_flight_;
    gateway_.idle_.notify_all();
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

 private:
  Gateway& gateway_;
};

Gateway::Gateway(const ServiceFlags& flags)
    : credentials_(flags.listen),
      max_in_flight_(flags.max_in_flight),
      worker_wait_(flags.worker_wait_ms),
      writes_(std::chrono::milliseconds(flags.write_stall_ms)),
      silence_(std::chrono::milliseconds(flags.worker_silence_ms)),
      workers_([this](const std::string& address) {
        return v1::AttentionService::NewStub(MakeChannel(address, credentials_));
      }),
      // Attempts of two gateways, or of one that restarted, must not meet in a worker.
      next_request_(FreshNodeId() << 20 | 1) {}

absl::StatusOr<std::unique_ptr<Gateway>> Gateway::Start(const ServiceFlags& flags) {
  std::unique_ptr<Gateway> gateway(new Gateway(flags));
  ASSIGN_OR_RETURN(gateway->host_, OpenModel(flags.model));
  gateway->limits_.max_context = gateway->host_->config.max_position_embeddings;
  gateway->limits_.default_deadline_ms = flags.default_deadline_ms;
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
  workers_.OnView(view);
  std::lock_guard<std::mutex> lock(mutex_);
  view_ = view;
  server_.SetServing(workers_.CanServe() && !draining_);
}

StatusServiceImpl::Counters Gateway::ReadCounters() {
  v1::ClusterView view;
  StatusServiceImpl::Counters counters{
      {"requests", requests_.load()},
      {"refused", refused_.load()},
      {"tokens_out", relay_counters_.tokens_out.load()},
      {"slow_clients_cut", relay_counters_.slow_clients_cut.load()},
      {"requests_replayed", relay_counters_.requests_replayed.load()},
      {"tokens_replayed", relay_counters_.tokens_replayed.load()},
      {"workers_silent", relay_counters_.workers_silent.load()},
      {"requests_inexact", relay_counters_.requests_inexact.load()},
      {"requests_poisonous", relay_counters_.requests_poisonous.load()}};
  {
    std::lock_guard<std::mutex> lock(mutex_);
    view = view_;
    counters["ready"] = workers_.CanServe() && !draining_ ? 1 : 0;
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

absl::StatusOr<std::unique_ptr<Gateway::Place>> Gateway::Admit() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (draining_) return absl::UnavailableError("the gateway is draining");
  if (in_flight_ >= max_in_flight_) {
    ++refused_;
    return absl::ResourceExhaustedError(
        absl::StrCat("too many requests in flight, limit ", max_in_flight_));
  }
  ++in_flight_;
  ++requests_;
  return std::make_unique<Place>(*this);
}

std::string Gateway::IdOf(const std::string& chosen) {
  return chosen.empty() ? absl::StrCat("req-", absl::Hex(next_request_.fetch_add(1))) : chosen;
}

grpc::Status Gateway::Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                               grpc::ServerWriter<v1::GenerateEvent>* writer) {
  absl::StatusOr<v1::ResolvedRequest> resolved = ResolveGenerate(*host_, limits_, *request);
  if (!resolved.ok()) return ToGrpc(resolved.status());
  const absl::StatusOr<std::unique_ptr<Place>> place = Admit();
  if (!place.ok()) return ToGrpc(place.status());
  const std::string id = IdOf(request->request_id());
  StreamRelay relay(Parts(), *context, id, resolved->deadline_ms());
  return relay.Generate(*std::move(resolved), request->resume(), *writer);
}

grpc::Status Gateway::Score(grpc::ServerContext* context, const v1::ScoreRequest* request,
                            v1::ScoreReply* reply) {
  absl::StatusOr<v1::ResolvedScore> resolved = ResolveScore(*host_, limits_, *request);
  if (!resolved.ok()) return ToGrpc(resolved.status());
  const absl::StatusOr<std::unique_ptr<Place>> place = Admit();
  if (!place.ok()) return ToGrpc(place.status());
  const std::string id = IdOf(request->request_id());
  StreamRelay relay(Parts(), *context, id, resolved->deadline_ms());
  const grpc::Status status = relay.Score(*std::move(resolved), *reply);
  reply->set_request_id(id);
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
