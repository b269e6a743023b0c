#pragma once

// A whole cluster in one thread: attention workers, their routers (in the same nodes or one on a
// node of its own) and expert workers, the real actors over a simulated network, and the clients
// behind a gateway, which keeps a journal of each stream and takes it to another attention worker
// when its own dies.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention_worker/attention_actor.h"
#include "expert_worker/expert_actor.h"
#include "router/placement.h"
#include "router/router_actor.h"
#include "runtime/sim/sim_world.h"
#include "services/gateway/request_journal.h"
#include "tests/cluster/sequential_oracle.h"
#include "tests/cluster/test_backend.h"
#include "tests/cluster/toy_model.h"

namespace moebius::cluster_test {

inline constexpr NodeId kAttentionNode{1};
inline constexpr NodeId kRouterNode{2};
inline constexpr NodeId kSecondAttentionNode{3};
inline constexpr uint64_t kFirstExpertNode = 10;

struct ClusterSimOptions {
  const ToyModel* model = nullptr;
  // Makes each actor's backend; all of them must give the oracle's bits.
  std::function<std::unique_ptr<kernels::Backend>()> new_backend = MakeTestBackend;
  uint64_t seed = 1;
  runtime::sim::SimOptions network;
  attention_worker::AttentionOptions attention;  // router, peer and digest are filled in
  int attention_workers = 1;                     // 1 or 2
  bool router_on_own_node = false;
  uint32_t max_rows_per_frame = 64;  // of dispatch frames
  // Expert workers 0 .. n-1, each on a node of its own, or all in the attention worker's node.
  // 0: no router and no experts at all; the oracle answers in the router's place.
  int expert_workers = 0;
  bool experts_in_attention_node = false;
  // Hosts of each (layer, expert), [layers * experts], the first preferred; see MakeHosts.
  std::vector<std::vector<int>> hosts;
};

// `replicas` distinct workers for every expert: neighbouring experts together, or, scrambled, each
// wherever the dice say, so that gate groups are split across workers.
std::vector<std::vector<int>> MakeHosts(const ToyModel& model, int workers, int replicas,
                                        bool scrambled, Prng& prng);

NodeId ExpertNode(int worker);

// What a client saw of its request, and how the gateway serves it.
struct ClientStream {
  OracleRequest request;
  services::RequestJournal journal;
  NodeId node{0};              // that serves the present attempt; 0: none does
  RequestId attempt{0};        // its number there
  runtime::TimePoint arrival;  // of the last event on its way to the client
  bool cancelled = false;
  std::vector<OracleToken> tokens;
  attention_worker::FinishReason finish = attention_worker::FinishReason::kNone;
  absl::Status status;
  uint32_t preemptions = 0;
  bool orderly = true;  // indices consecutive, nothing after the last event
};

class ClusterSim {
 public:
  explicit ClusterSim(const ClusterSimOptions& options);

  // Posts the request after `delay`. ids must be new.
  void Generate(uint64_t id, const OracleRequest& request, runtime::Duration delay);
  void Cancel(uint64_t id, runtime::Duration delay);

  // The attention worker dies after `delay` and comes back `down` later. Its streams' events that
  // have not arrived yet are lost; the gateway hears of it within 20 ms.
  void CrashAttention(NodeId node, runtime::Duration delay, runtime::Duration down);

  // Request `id` kills its attention worker, this long after it came aboard, every time.
  void Poison(uint64_t id, runtime::Duration after) { poison_[id] = after; }

  // Publishes a new placement to the router after `delay`. Workers host what the first placement
  // and this one give them from then on, so that an order in flight is never wrong; `dropping`
  // makes them drop what the new one does not, which some rows will find out by kNotHosted.
  void Move(const std::vector<std::vector<int>>& hosts, bool dropping, runtime::Duration delay);

  // Runs until every request has ended; false after `limit` of virtual time.
  bool RunToEnd(runtime::Duration limit);

  const std::map<uint64_t, ClientStream>& streams() const { return streams_; }
  // Sums over the attention workers that are alive.
  attention_worker::AttentionCounters counters() const;
  uint64_t replays() const;
  // Of the latest incarnation of a router; nullptr without expert workers.
  const router::RouterCounters* router_counters() const { return router_counters_.get(); }
  // (row, expert) pairs served by all incarnations of each worker.
  std::vector<uint64_t> items_served() const;
  runtime::sim::SimWorld& world() { return world_; }
  std::vector<NodeId> nodes() const;
  std::vector<NodeId> AttentionNodes() const;

  // Empty if blocks, buffers and credits all are back where they belong after `quiet`; else
  // what is not.
  std::string Imbalance(runtime::Duration quiet);

 private:
  void AddAttentionActor(runtime::Node& node);
  void Attempt(uint64_t id);
  void Arrived(uint64_t id, RequestId attempt, const attention_worker::TokenEvent& event);
  void AttemptEnded(uint64_t id, const absl::Status& status);
  void Cancelled(ClientStream& stream);
  void AddRouterActor(runtime::Node& node);
  void AddExpertActor(int worker, runtime::Node& node);
  wire::RowLimits Limits() const;
  ActorId ExpertActorId(int worker) const;
  NodeId NodeOf(int worker) const;
  std::shared_ptr<const router::Placement> MakePlacement() const;
  expert_worker::HostExperts HostOrder(int worker) const;
  kernels::Backend* NewBackend();

  ClusterSimOptions options_;
  uint64_t epoch_ = 1;
  std::vector<std::vector<int>> hosts_;   // as the router knows it
  std::vector<std::vector<int>> hosted_;  // what workers hold (a superset)
  // Outlive the world, whose actors use them.
  std::vector<std::unique_ptr<kernels::Backend>> backends_;
  std::map<uint64_t, ClientStream> streams_;
  runtime::sim::SimWorld world_;
  std::map<NodeId, attention_worker::AttentionActor*> attention_;  // of those alive
  uint64_t attempts_ = 0;
  std::map<uint64_t, runtime::Duration> poison_;
  Prng arrivals_;  // of events at the client
  std::shared_ptr<const router::RouterCounters> router_counters_;
  std::vector<std::pair<int, std::shared_ptr<const expert_worker::ExpertCounters>>>
      expert_counters_;
};

}  // namespace moebius::cluster_test
