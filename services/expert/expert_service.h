#pragma once

// One expert worker process: model, backend, node with the expert actor, status server, controller
// client.

#include <memory>
#include <set>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "expert_worker/expert_actor.h"
#include "services/common/controller_client.h"
#include "services/common/data_node.h"
#include "services/common/flags.h"
#include "services/common/model_host.h"
#include "services/common/status_service.h"

namespace moebius::services {

class ExpertService {
 public:
  static absl::StatusOr<std::unique_ptr<ExpertService>> Start(const ServiceFlags& flags);
  ~ExpertService();
  const std::string& address() const { return server_.address; }
  // Leaves the placement, waits until nothing is queued (bounded), stops.
  void Drain();

 private:
  ExpertService() = default;
  absl::Status CarryOut(const v1::HostOrder& order);

  std::unique_ptr<ModelHost> host_;
  std::unique_ptr<kernels::Backend> backend_;
  std::unique_ptr<DataNode> data_;
  std::shared_ptr<const expert_worker::ExpertCounters> counters_;
  std::set<std::pair<uint32_t, uint32_t>> hosted_;  // order thread only
  std::unique_ptr<StatusServiceImpl> status_;
  RunningServer server_;
  std::unique_ptr<ControllerClient> controller_;
};

}  // namespace moebius::services
