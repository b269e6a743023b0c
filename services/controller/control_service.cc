#include "services/controller/control_service.h"

#include <chrono>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "services/common/grpc_status.h"

namespace moebius::services {
namespace {

constexpr std::chrono::milliseconds kTick(50);

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void FillExperts(const WorkerShare& share,
                 google::protobuf::RepeatedPtrField<v1::LayerExperts>* out) {
  for (size_t layer = 0; layer < share.experts.size(); ++layer) {
    if (share.experts[layer].empty()) continue;
    v1::LayerExperts* entry = out->Add();
    entry->set_layer(static_cast<uint32_t>(layer));
    for (uint32_t expert : share.experts[layer]) entry->add_experts(expert);
  }
}

}  // namespace

ControlService::ControlService(ClusterOptions options, uint64_t term)
    : state_(std::move(options)), term_(term) {
  ticker_ = std::thread([this] {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_) {
      const uint64_t epoch = state_.epoch();
      if (state_.Tick(NowMs())) changed_.notify_all();
      if (state_.epoch() != epoch) {
        LOG_INFO(absl::StrCat("placement epoch ", state_.epoch(), " over ",
                              state_.published().size(), " expert workers"));
      }
      changed_.wait_for(lock, kTick, [this] { return stopping_; });
    }
  });
}

ControlService::~ControlService() { Stop(); }

void ControlService::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (ticker_.joinable()) ticker_.join();
}

grpc::Status ControlService::Renew(grpc::ServerContext*, const v1::RenewRequest* request,
                                   v1::RenewReply* reply) {
  const v1::Worker& worker = request->worker();
  WorkerRecord record;
  record.node = worker.node();
  record.incarnation = worker.incarnation();
  if (worker.role() != v1::ROLE_ATTENTION && worker.role() != v1::ROLE_EXPERT) {
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "worker.role is not set");
  }
  record.role = worker.role() == v1::ROLE_ATTENTION ? WorkerRole::kAttention : WorkerRole::kExpert;
  record.data_address = worker.data_address();
  record.grpc_address = worker.grpc_address();
  record.model_digest = worker.model_digest();
  record.numerics = worker.numerics();
  record.ready = worker.ready();
  record.leaving = request->leaving();
  record.operation_done = request->operation_done();
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t before = state_.version();
  const bool known = state_.Find(record.node) != nullptr;
  const absl::Status status = state_.Renew(record, NowMs());
  if (!status.ok()) return ToGrpc(status);
  if (!known) {
    LOG_INFO(absl::StrCat(record.role == WorkerRole::kExpert ? "expert" : "attention", " worker ",
                          record.node, " at ", record.data_address));
  }
  if (state_.Tick(NowMs()) || state_.version() != before) changed_.notify_all();
  reply->set_lease_ms(static_cast<uint64_t>(state_.lease_ms()));
  const WorkerRecord* current = state_.Find(record.node);
  if (current != nullptr && current->operation != 0) {
    reply->mutable_order()->set_operation_id(current->operation);
    reply->mutable_order()->set_term(term_);
    FillExperts(current->share, reply->mutable_order()->mutable_experts());
  }
  return grpc::Status::OK;
}

void ControlService::FillView(v1::ClusterView* view) const {
  view->set_epoch(state_.epoch());
  view->set_complete(state_.complete());
  view->set_settled(state_.settled());
  for (const PublishedHost& host : state_.published()) {
    v1::ExpertHost* entry = view->add_hosts();
    entry->set_node(host.node);
    entry->set_incarnation(host.incarnation);
    entry->set_data_address(host.data_address);
    FillExperts(host.share, entry->mutable_experts());
  }
  for (const auto& [node, record] : state_.workers()) {
    v1::Worker* entry = view->add_workers();
    entry->set_node(node);
    entry->set_incarnation(record.incarnation);
    entry->set_role(record.role == WorkerRole::kAttention ? v1::ROLE_ATTENTION : v1::ROLE_EXPERT);
    entry->set_data_address(record.data_address);
    entry->set_grpc_address(record.grpc_address);
    entry->set_model_digest(record.model_digest);
    entry->set_numerics(record.numerics);
    entry->set_ready(record.ready && !record.leaving);
  }
}

grpc::Status ControlService::Watch(grpc::ServerContext* context, const v1::WatchRequest*,
                                   grpc::ServerWriter<v1::ClusterView>* writer) {
  // An unchanged view is said again now and then: a watcher takes silence for a dead connection.
  constexpr std::chrono::milliseconds kBeat(1000);
  uint64_t seen = 0;
  auto next_beat = std::chrono::steady_clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_ && !context->IsCancelled()) {
    if (state_.version() == seen && std::chrono::steady_clock::now() < next_beat) {
      changed_.wait_for(lock, kBeat / 2);
      continue;
    }
    next_beat = std::chrono::steady_clock::now() + kBeat;
    seen = state_.version();
    v1::ClusterView view;
    FillView(&view);
    lock.unlock();
    const bool written = writer->Write(view);
    lock.lock();
    if (!written) break;
  }
  return grpc::Status::OK;
}

}  // namespace moebius::services
