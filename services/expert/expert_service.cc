#include "services/expert/expert_service.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <future>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "services/common/process.h"

namespace moebius::services {

absl::StatusOr<std::unique_ptr<ExpertService>> ExpertService::Start(const ServiceFlags& flags) {
  RETURN_IF_ERROR(CheckWorkerBindPolicy(flags.listen, flags.data_address));
  std::unique_ptr<ExpertService> service(new ExpertService());
  ASSIGN_OR_RETURN(service->host_, OpenModel(flags.model));
  const ModelHost& host = *service->host_;
  service->backend_ = MakeBackend(flags.threads);
  ASSIGN_OR_RETURN(service->data_, DataNode::Open(host, *service->backend_, flags.data_address,
                                                  flags.node, wire::NodeRole::kExpert));
  expert_worker::ExpertOptions options = MakeExpertOptions(host.config, kMaxStepRows);
  options.on_backend_failure = EndAfterFailure;
  auto actor =
      std::make_unique<expert_worker::ExpertActor>(std::move(options), service->backend_.get());
  service->counters_ = actor->counters();
  runtime::Node& node = service->data_->node();
  node.AddActor(runtime::kExpertWorker, std::move(actor));
  service->data_->Start();

  service->status_ =
      std::make_unique<StatusServiceImpl>("expert", node.id().value(), [raw = service.get()] {
        const expert_worker::ExpertCounters& c = *raw->counters_;
        return StatusServiceImpl::Counters{{"rows_served", c.items_served.load()},
                                           {"batches", c.batches.load()},
                                           {"not_hosted", c.not_hosted.load()},
                                           {"refused_frames", c.refused_frames.load()},
                                           {"experts_hosted", c.experts_hosted.load()}};
      });
  ASSIGN_OR_RETURN(service->server_, StartServer(flags.listen, {service->status_.get()}));

  v1::Worker self;
  self.set_node(node.id().value());
  self.set_incarnation(node.incarnation().value());
  self.set_role(v1::ROLE_EXPERT);
  self.set_data_address(service->data_->address());
  self.set_grpc_address(service->server_.address);
  self.set_model_digest(model::ToHex(host.manifest.digest));
  self.set_numerics(service->backend_->NumericsName());
  service->controller_ = std::make_unique<ControllerClient>(
      flags.controller, flags.listen, self,
      ControllerClient::Handlers{
          [raw = service.get()](const v1::HostOrder& order) { return raw->CarryOut(order); },
          nullptr});
  service->controller_->Start();
  RETURN_IF_ERROR(PublishAddress(flags.port_file, service->server_.address));
  return service;
}

ExpertService::~ExpertService() = default;

absl::Status ExpertService::CarryOut(const v1::HostOrder& order) {
  // Only what is missing is loaded. What the order leaves out stays until the process ends:
  // answering for an expert that moved is right, and a placement that is not published yet may
  // still be asking for it.
  for (const v1::LayerExperts& layer : order.experts()) {
    std::vector<ExpertId> missing;
    for (uint32_t expert : layer.experts()) {
      if (layer.layer() >= host_->config.total_layers() ||
          expert >= host_->config.n_routed_experts) {
        return absl::InvalidArgumentError(
            absl::StrCat("order names layer ", layer.layer(), ", expert ", expert));
      }
      if (hosted_.count({layer.layer(), expert}) == 0) missing.push_back(ExpertId(expert));
    }
    if (missing.empty()) continue;
    ASSIGN_OR_RETURN(expert_worker::HostExperts hosts,
                     LoadExperts(*host_, LayerId(layer.layer()), missing));
    RETURN_IF_ERROR(data_->node().Post(runtime::kExpertWorker, std::move(hosts)));
    for (ExpertId expert : missing) hosted_.insert({layer.layer(), expert.value()});
    LOG_INFO(absl::StrCat("layer ", layer.layer(), ": loaded ", missing.size(), " experts, ",
                          hosted_.size(), " in all"));
  }
  server_.SetServing(true);
  controller_->SetReady(true);
  return absl::OkStatus();
}

void ExpertService::Drain() {
  server_.StopServing();
  controller_->Leave();
  // The controller plans around us and routers follow. Whoever has nobody else to ask still asks
  // us: serve until no row has come for a while, within the grace.
  constexpr std::chrono::milliseconds kQuiet(1000);
  constexpr std::chrono::seconds kGrace(30);
  const auto end = std::chrono::steady_clock::now() + kGrace;
  uint64_t rows = counters_->rows_received.load();
  for (auto quiet_since = std::chrono::steady_clock::now();
       std::chrono::steady_clock::now() - quiet_since < kQuiet &&
       std::chrono::steady_clock::now() < end;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    if (counters_->rows_received.load() == rows) continue;
    rows = counters_->rows_received.load();
    quiet_since = std::chrono::steady_clock::now();
  }
  auto drained = std::make_shared<std::promise<void>>();
  std::future<void> done = drained->get_future();
  (void)data_->node().Post(runtime::kExpertWorker,
                           expert_worker::Drain{[drained] { drained->set_value(); }});
  done.wait_for(std::chrono::seconds(5));
  controller_->Stop();
  server_.server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
  data_->Stop();
}

}  // namespace moebius::services
