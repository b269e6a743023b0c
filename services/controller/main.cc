// moebius-controller: who is alive and who hosts which expert. Holds no state that workers do not
// report again.

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "services/common/flags.h"
#include "services/common/model_host.h"
#include "services/common/process.h"
#include "services/controller/control_service.h"

namespace moebius::services {
namespace {

ClusterOptions MakeClusterOptions(const ModelHost& host, const ServiceFlags& flags) {
  ClusterOptions options;
  options.plan.moe_layers.resize(static_cast<size_t>(host.config.total_layers()));
  for (int64_t layer = 0; layer < host.config.num_hidden_layers; ++layer) {
    options.plan.moe_layers[static_cast<size_t>(layer)] = host.config.is_moe_layer(layer);
  }
  options.plan.experts_per_layer = static_cast<uint32_t>(host.config.n_routed_experts);
  options.plan.group_size =
      static_cast<uint32_t>(host.config.n_routed_experts / host.config.n_group);
  options.model_digest = model::ToHex(host.manifest.digest);
  options.plan.replicas = flags.replicas;
  options.expected_experts = flags.expected_experts;
  return options;
}

int Run(const ServiceFlags& flags) {
  absl::StatusOr<std::unique_ptr<ModelHost>> host = OpenModel(flags.model);
  if (!host.ok()) {
    LOG_ERROR(host.status().ToString());
    return 1;
  }
  // One number, taken from the clock, orders controllers and the epochs they publish.
  const uint64_t term = FreshIncarnation();
  ClusterOptions options = MakeClusterOptions(**host, flags);
  options.first_epoch = term;
  ControlService control(std::move(options), term);
  absl::StatusOr<RunningServer> server = StartServer(flags.listen, {&control});
  if (!server.ok()) {
    LOG_ERROR(server.status().ToString());
    return 1;
  }
  server->SetServing(true);
  if (const absl::Status status = PublishAddress(flags.port_file, server->address); !status.ok()) {
    LOG_ERROR(status.ToString());
    return 1;
  }
  LOG_INFO(absl::StrCat("serving on ", server->address));
  WaitForStop();
  control.Stop();
  server->server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
  return 0;
}

}  // namespace
}  // namespace moebius::services

int main(int argc, char** argv) {
  using namespace moebius::services;
  BlockStopSignals();
  return Run(ParseFlagsOrExit(ServiceRole::kController, argc, argv));
}
