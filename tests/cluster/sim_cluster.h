#pragma once

// A whole cluster in one thread: one attention worker, its router (in the same node or on one of
// its own) and expert workers, the real actors over a simulated network, and the clients.

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "attention_worker/attention_actor.h"
#include "runtime/sim/sim_world.h"
#include "tests/cluster/sequential_oracle.h"
#include "tests/cluster/test_backend.h"
#include "tests/cluster/toy_model.h"

namespace moebius::cluster_test {

inline constexpr NodeId kAttentionNode{1};
inline constexpr NodeId kRouterNode{2};
inline constexpr uint64_t kFirstExpertNode = 10;

struct SimClusterOptions {
  const ToyModel* model = nullptr;
  uint64_t seed = 1;
  runtime::sim::SimOptions network;
  attention_worker::AttentionOptions attention;  // router, peer and digest are filled in
  bool router_on_own_node = false;
};

// What a client saw of its request.
struct ClientStream {
  OracleRequest request;
  std::vector<OracleToken> tokens;
  attention_worker::FinishReason finish = attention_worker::FinishReason::kNone;
  absl::Status status;
  uint32_t preemptions = 0;
  bool orderly = true;  // indices consecutive, nothing after the last event
};

class SimCluster {
 public:
  explicit SimCluster(const SimClusterOptions& options);

  // Posts the request after `delay`. ids must be new.
  void Generate(uint64_t id, const OracleRequest& request, runtime::Duration delay);
  void Cancel(uint64_t id, runtime::Duration delay);

  // Runs until every request has ended; false after `limit` of virtual time.
  bool RunToEnd(runtime::Duration limit);

  const std::map<uint64_t, ClientStream>& streams() const { return streams_; }
  attention_worker::AttentionCounters counters() const { return attention_->counters(); }
  runtime::sim::SimWorld& world() { return world_; }
  std::vector<NodeId> nodes() const;

  // Empty if blocks, buffers and credits all are back where they belong after `quiet`; else
  // what is not.
  std::string Imbalance(runtime::Duration quiet);

 private:
  void AddRouterActor(runtime::Node& node);
  kernels::Backend* NewBackend();

  const SimClusterOptions options_;
  // Outlive the world, whose actors use them.
  std::vector<std::unique_ptr<kernels::Backend>> backends_;
  std::map<uint64_t, ClientStream> streams_;
  runtime::sim::SimWorld world_;
  attention_worker::AttentionActor* attention_ = nullptr;
};

}  // namespace moebius::cluster_test
