#pragma once

// The controller's soft state: who is alive, who should host what, what is hosted. A plain state
// machine without gRPC, threads or clocks (the caller gives the time), so that it is tested
// directly.
//
// A worker is alive while it renews its lease. Once `expected_experts` expert workers have
// registered (or the settle time has passed since the last change of them) a placement is planned
// and each gets an order; when all have carried theirs out the placement is published under the
// next epoch. A lapsed or leaving worker is planned away from; what is published stays published
// until the next placement is ready, so serving never stops for a change.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "services/controller/placement_planner.h"

namespace moebius::services {

enum class WorkerRole : uint8_t { kAttention, kExpert };

struct WorkerRecord {
  uint64_t node = 0;
  uint64_t incarnation = 0;
  WorkerRole role = WorkerRole::kExpert;
  std::string data_address;
  std::string grpc_address;
  std::string model_digest;
  std::string numerics;
  bool ready = false;
  bool leaving = false;
  uint64_t operation_done = 0;
  int64_t lease_until_ms = 0;
  // The order in force for this incarnation.
  uint64_t operation = 0;
  WorkerShare share;
};

struct PublishedHost {
  uint64_t node = 0;
  uint64_t incarnation = 0;
  std::string data_address;
  WorkerShare share;
};

struct ClusterOptions {
  PlanInput plan;
  std::string model_digest;
  uint32_t expected_experts = 1;  // the first placement waits for so many
  // Epochs start above it. A later controller must start above every epoch of an earlier one,
  // because routers ignore placements that are not newer than theirs.
  uint64_t first_epoch = 0;
  int64_t lease_ms = 3000;
  int64_t settle_ms = 300;  // quiet time before a changed set of workers is planned for
};

class ClusterState {
 public:
  // Operations are numbered above `first_epoch` too: what a worker did for an earlier controller
  // must not count as done for this one.
  explicit ClusterState(ClusterOptions options)
      : options_(std::move(options)), next_operation_(options_.first_epoch + 1) {}

  // FAILED_PRECONDITION for another model; ABORTED for an older incarnation of a known node.
  absl::Status Renew(const WorkerRecord& report, int64_t now_ms);
  // Lapses leases, plans, publishes. Call often. True if the view changed.
  bool Tick(int64_t now_ms);

  const WorkerRecord* Find(uint64_t node) const;
  uint64_t epoch() const { return epoch_; }
  // Every expert has a live host in the published placement.
  bool complete() const;
  // A lease has passed since the first Tick: every live worker has had time to renew here, so one
  // that is unknown is gone. A restarted controller must not be believed before.
  bool settled() const { return settled_; }
  const std::vector<PublishedHost>& published() const { return published_; }
  const std::map<uint64_t, WorkerRecord>& workers() const { return workers_; }
  int64_t lease_ms() const { return options_.lease_ms; }
  // Grows with every change that a watcher should hear of.
  uint64_t version() const { return version_; }

 private:
  std::vector<uint64_t> PlaceableExperts() const;
  void Plan(const std::vector<uint64_t>& nodes);

  const ClusterOptions options_;
  std::map<uint64_t, WorkerRecord> workers_;
  std::vector<std::pair<uint64_t, uint64_t>>
      planned_for_;  // (node, incarnation) of the plan in force
  std::vector<PublishedHost> published_;
  std::optional<int64_t> first_tick_ms_;
  bool settled_ = false;
  bool plan_pending_ = false;  // ordered, not yet published
  int64_t changed_at_ms_ = 0;
  uint64_t next_operation_;
  uint64_t epoch_ = 0;
  uint64_t version_ = 1;
};

}  // namespace moebius::services
