#include "services/controller/cluster_state.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace moebius::services {

absl::Status ClusterState::Renew(const WorkerRecord& report, int64_t now_ms) {
  if (report.node == 0 || report.incarnation == 0) {
    return absl::InvalidArgumentError("worker: node and incarnation must not be 0");
  }
  if (report.model_digest != options_.model_digest) {
    return absl::FailedPreconditionError(absl::StrCat("worker ", report.node, " serves model ",
                                                      report.model_digest, ", this cluster ",
                                                      options_.model_digest));
  }
  auto [it, added] = workers_.try_emplace(report.node, report);
  WorkerRecord& worker = it->second;
  if (!added && report.incarnation < worker.incarnation) {
    return absl::AbortedError(absl::StrCat("worker ", report.node, " has a newer incarnation"));
  }
  const bool reborn = added || report.incarnation > worker.incarnation;
  if (reborn || worker.ready != report.ready || worker.leaving != report.leaving ||
      worker.grpc_address != report.grpc_address) {
    ++version_;
  }
  if (reborn || worker.leaving != report.leaving) changed_at_ms_ = now_ms;
  if (reborn && report.role == WorkerRole::kExpert) {
    // Whatever was planned with it is no longer in force there, even if it is the same incarnation
    // that was away for a lease.
    planned_for_.clear();
    plan_pending_ = false;
  }
  const uint64_t operation = reborn ? 0 : worker.operation;
  WorkerShare share = reborn ? WorkerShare() : worker.share;
  worker = report;
  worker.operation = operation;
  worker.share = std::move(share);
  worker.lease_until_ms = now_ms + options_.lease_ms;
  return absl::OkStatus();
}

const WorkerRecord* ClusterState::Find(uint64_t node) const {
  const auto it = workers_.find(node);
  return it == workers_.end() ? nullptr : &it->second;
}

std::vector<uint64_t> ClusterState::PlaceableExperts() const {
  std::vector<uint64_t> nodes;
  for (const auto& [node, worker] : workers_) {
    if (worker.role == WorkerRole::kExpert && !worker.leaving) nodes.push_back(node);
  }
  return nodes;
}

void ClusterState::Plan(const std::vector<uint64_t>& nodes) {
  std::vector<WorkerShare> before;
  for (const auto& [node, worker] : workers_) {
    if (worker.role == WorkerRole::kExpert && worker.operation != 0) before.push_back(worker.share);
  }
  for (WorkerShare& share : PlanPlacement(options_.plan, nodes, before)) {
    WorkerRecord& worker = workers_.at(share.node);
    if (worker.operation != 0 && worker.share.experts == share.experts)
      continue;  // nothing to do there
    worker.share = std::move(share);
    worker.operation = next_operation_++;
  }
  planned_for_.clear();
  for (uint64_t node : nodes) planned_for_.emplace_back(node, workers_.at(node).incarnation);
  plan_pending_ = true;
}

bool ClusterState::Tick(int64_t now_ms) {
  const uint64_t before = version_;
  if (!first_tick_ms_) first_tick_ms_ = now_ms;
  if (!settled_ && now_ms - *first_tick_ms_ > options_.lease_ms) {
    settled_ = true;
    ++version_;
  }
  for (auto it = workers_.begin(); it != workers_.end();) {
    if (now_ms <= it->second.lease_until_ms) {
      ++it;
      continue;
    }
    it = workers_.erase(it);
    changed_at_ms_ = now_ms;
    ++version_;
  }
  const std::vector<uint64_t> nodes = PlaceableExperts();
  std::vector<std::pair<uint64_t, uint64_t>> wanted;
  for (uint64_t node : nodes) wanted.emplace_back(node, workers_.at(node).incarnation);
  const bool enough = nodes.size() >= options_.expected_experts || epoch_ > 0;
  const bool settled =
      now_ms - changed_at_ms_ >= options_.settle_ms || nodes.size() == options_.expected_experts;
  if (!nodes.empty() && enough && settled && wanted != planned_for_) Plan(nodes);
  if (plan_pending_) {
    const bool all_done =
        std::all_of(planned_for_.begin(), planned_for_.end(), [&](const auto& entry) {
          const WorkerRecord* worker = Find(entry.first);
          return worker != nullptr && worker->incarnation == entry.second &&
                 worker->operation != 0 && worker->operation_done >= worker->operation;
        });
    if (all_done) {
      published_.clear();
      for (const auto& [node, incarnation] : planned_for_) {
        const WorkerRecord& worker = workers_.at(node);
        published_.push_back(PublishedHost{node, incarnation, worker.data_address, worker.share});
      }
      plan_pending_ = false;
      epoch_ = std::max(epoch_, options_.first_epoch) + 1;
      ++version_;
    }
  }
  return version_ != before;
}

bool ClusterState::complete() const {
  if (published_.empty()) return false;
  for (size_t layer = 0; layer < options_.plan.moe_layers.size(); ++layer) {
    if (!options_.plan.moe_layers[layer]) continue;
    std::vector<bool> hosted(options_.plan.experts_per_layer, false);
    for (const PublishedHost& host : published_) {
      const WorkerRecord* worker = Find(host.node);
      if (worker == nullptr || worker->incarnation != host.incarnation) continue;
      if (layer >= host.share.experts.size()) continue;
      for (const uint32_t expert : host.share.experts[layer]) hosted[expert] = true;
    }
    if (std::find(hosted.begin(), hosted.end(), false) != hosted.end()) return false;
  }
  return true;
}

}  // namespace moebius::services
