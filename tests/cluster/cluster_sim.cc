#include "tests/cluster/cluster_sim.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "tests/cluster/oracle_router.h"

namespace moebius::cluster_test {
namespace {

using attention_worker::FinishReason;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr uint64_t kModelDigest = 0x70'1D'16E5'7;

runtime::NodeOptions NodeOptionsFor(wire::NodeRole role) {
  runtime::NodeOptions options;
  options.identity.role = role;
  options.identity.model_digest = {kModelDigest, 0};
  return options;
}

}  // namespace

std::vector<std::vector<int>> MakeHosts(const ToyModel& model, int workers, int replicas,
                                        bool scrambled, Prng& prng) {
  const model::ModelConfig& config = model.config();
  const int64_t experts = config.n_routed_experts;
  std::vector<std::vector<int>> hosts(config.num_hidden_layers * experts);
  for (int64_t i = 0; i < static_cast<int64_t>(hosts.size()); ++i) {
    // Any number of workers: shares may be unequal, some worker may hold nothing of a layer.
    const int first = scrambled ? static_cast<int>(prng.Below(workers))
                                : static_cast<int>(i % experts * workers / experts);
    for (int r = 0; r < std::min(replicas, workers); ++r) {
      hosts[i].push_back((first + r) % workers);
    }
  }
  return hosts;
}

NodeId ExpertNode(int worker) { return NodeId(kFirstExpertNode + static_cast<uint64_t>(worker)); }

ClusterSim::ClusterSim(const ClusterSimOptions& options)
    : options_(options),
      hosts_(options.hosts),
      hosted_(options.hosts),
      world_(options.seed, options.network),
      arrivals_(options.seed) {
  const std::vector<runtime::BufferClass> buffers = {{512, 64}, {8192, 96}, {160 * 1024, 24}};
  if (!options.experts_in_attention_node) {
    for (int w = 0; w < options.expert_workers; ++w) {
      world_.AddNode(ExpertNode(w), NodeOptionsFor(wire::NodeRole::kExpert), buffers,
                     [this, w](runtime::Node& node) { AddExpertActor(w, node); });
    }
  }
  if (options.router_on_own_node) {
    world_.AddNode(kRouterNode, NodeOptionsFor(wire::NodeRole::kRouter), buffers,
                   [this](runtime::Node& node) { AddRouterActor(node); });
  }
  for (const NodeId id : AttentionNodes()) {
    world_.AddNode(id, NodeOptionsFor(wire::NodeRole::kAttention), buffers,
                   [this](runtime::Node& node) {
                     AddAttentionActor(node);
                     if (!options_.router_on_own_node) AddRouterActor(node);
                     if (!options_.experts_in_attention_node) return;
                     for (int w = 0; w < options_.expert_workers; ++w) AddExpertActor(w, node);
                   });
  }
}

std::vector<NodeId> ClusterSim::AttentionNodes() const {
  if (options_.attention_workers == 1) return {kAttentionNode};
  return {kAttentionNode, kSecondAttentionNode};
}

void ClusterSim::AddAttentionActor(runtime::Node& node) {
  attention_worker::AttentionOptions attention = options_.attention;
  attention.model_digest = kModelDigest;
  attention.router = {options_.router_on_own_node ? kRouterNode : node.id(), runtime::kRouter};
  if (options_.router_on_own_node) {
    attention.router_peer = runtime::PeerInfo{kRouterNode, Incarnation(0),
                                              runtime::sim::SimWorld::AddressOf(kRouterNode)};
  }
  auto actor = std::make_unique<attention_worker::AttentionActor>(
      attention_worker::AttentionModel{.config = &options_.model->config(),
                                       .weights = &options_.model->weights(),
                                       .backend = NewBackend()},
      attention);
  attention_[node.id()] = actor.get();
  node.AddActor(runtime::kAttentionWorker, std::move(actor));
}

kernels::Backend* ClusterSim::NewBackend() {
  backends_.push_back(options_.new_backend());
  return backends_.back().get();
}

wire::RowLimits ClusterSim::Limits() const {
  const model::ModelConfig& config = options_.model->config();
  wire::RowLimits limits;
  limits.hidden = static_cast<uint32_t>(config.hidden_size);
  limits.layers = static_cast<uint32_t>(config.num_hidden_layers);
  limits.experts_per_layer = static_cast<uint32_t>(config.n_routed_experts);
  limits.top_k = static_cast<uint32_t>(config.num_experts_per_tok);
  limits.max_rows = static_cast<uint32_t>(options_.attention.max_step_tokens);
  limits.e4m3 = config.wire_dtype() == model::WireDtype::kE4m3;
  return limits;
}

ActorId ClusterSim::ExpertActorId(int worker) const {
  const int offset = options_.experts_in_attention_node ? worker : 0;
  return ActorId(static_cast<uint16_t>(runtime::kExpertWorker.value() + offset));
}

NodeId ClusterSim::NodeOf(int worker) const {
  return options_.experts_in_attention_node ? kAttentionNode : ExpertNode(worker);
}

void ClusterSim::AddRouterActor(runtime::Node& node) {
  if (options_.expert_workers == 0) {
    node.AddActor(runtime::kRouter, std::make_unique<OracleRouter>(options_.model, NewBackend()));
    return;
  }
  router::RouterOptions options;
  options.limits = Limits();
  options.gate = options_.model->gate_config();
  options.power_of_two_scales = options_.model->config().power_of_two_scales();
  options.max_rows_per_frame = options_.max_rows_per_frame;
  for (const model::AttentionLayerWeights& layer : options_.model->weights().layers) {
    router::GateWeights gate;
    if (layer.moe) gate = {layer.moe->gate, layer.moe->e_score_correction_bias.data()};
    options.layers.push_back(gate);
  }
  auto actor = std::make_unique<router::RouterActor>(options, NewBackend());
  router_counters_ = actor->counters();
  node.AddActor(runtime::kRouter, std::move(actor));
  CHECK(node.Post(runtime::kRouter, router::PlacementUpdate{MakePlacement()}).ok());
}

void ClusterSim::AddExpertActor(int worker, runtime::Node& node) {
  expert_worker::ExpertOptions options;
  options.limits = Limits();
  options.intermediate = options_.model->config().moe_intermediate_size;
  options.power_of_two_scales = options_.model->config().power_of_two_scales();
  auto actor = std::make_unique<expert_worker::ExpertActor>(options, NewBackend());
  expert_counters_.emplace_back(worker, actor->counters());
  node.AddActor(ExpertActorId(worker), std::move(actor));
  CHECK(node.Post(ExpertActorId(worker), HostOrder(worker)).ok());
}

std::shared_ptr<const router::Placement> ClusterSim::MakePlacement() const {
  const model::ModelConfig& config = options_.model->config();
  auto placement = std::make_shared<router::Placement>(
      Epoch(epoch_), static_cast<uint32_t>(config.num_hidden_layers),
      static_cast<uint32_t>(config.n_routed_experts));
  for (size_t i = 0; i < hosts_.size(); ++i) {
    const LayerId layer(static_cast<uint32_t>(i / config.n_routed_experts));
    const ExpertId expert(static_cast<uint32_t>(i % config.n_routed_experts));
    if (!config.is_moe_layer(layer.value())) continue;
    for (const int worker : hosts_[i]) {
      placement->AddReplica(layer, expert, {NodeOf(worker), ExpertActorId(worker)});
    }
  }
  if (!options_.experts_in_attention_node) {
    for (int w = 0; w < options_.expert_workers; ++w) {
      placement->AddPeer(
          {ExpertNode(w), Incarnation(0), runtime::sim::SimWorld::AddressOf(ExpertNode(w))});
    }
  }
  return placement;
}

expert_worker::HostExperts ClusterSim::HostOrder(int worker) const {
  const model::ModelConfig& config = options_.model->config();
  expert_worker::HostExperts order;
  for (size_t i = 0; i < hosted_.size(); ++i) {
    const int64_t layer = static_cast<int64_t>(i) / config.n_routed_experts;
    const int64_t expert = static_cast<int64_t>(i) % config.n_routed_experts;
    if (!config.is_moe_layer(layer)) continue;
    if (std::find(hosted_[i].begin(), hosted_[i].end(), worker) == hosted_[i].end()) continue;
    const model::MlpWeights& mlp = options_.model->expert(layer, expert);
    order.experts.push_back({LayerId(static_cast<uint32_t>(layer)),
                             ExpertId(static_cast<uint32_t>(expert)),
                             {mlp.gate_proj, mlp.up_proj, mlp.down_proj}});
  }
  return order;
}

void ClusterSim::Move(const std::vector<std::vector<int>>& hosts, bool dropping,
                      runtime::Duration delay) {
  world_.Schedule(delay, [this, hosts, dropping] {
    const std::vector<std::vector<int>> before = std::move(hosts_);
    hosts_ = hosts;
    hosted_ = hosts;
    if (!dropping) {
      for (size_t i = 0; i < hosted_.size(); ++i) {
        hosted_[i].insert(hosted_[i].end(), before[i].begin(), before[i].end());
      }
    }
    ++epoch_;
    const model::ModelConfig& config = options_.model->config();
    for (int w = 0; w < options_.expert_workers; ++w) {
      if (!world_.alive(NodeOf(w))) continue;  // its restart hosts what it should
      CHECK(world_.node(NodeOf(w)).Post(ExpertActorId(w), HostOrder(w)).ok());
      expert_worker::DropExperts drop;
      for (size_t i = 0; i < hosted_.size(); ++i) {
        if (std::find(hosted_[i].begin(), hosted_[i].end(), w) != hosted_[i].end()) continue;
        drop.experts.emplace_back(LayerId(static_cast<uint32_t>(i / config.n_routed_experts)),
                                  ExpertId(static_cast<uint32_t>(i % config.n_routed_experts)));
      }
      if (dropping) CHECK(world_.node(NodeOf(w)).Post(ExpertActorId(w), drop).ok());
    }
    const std::vector<NodeId> routers =
        options_.router_on_own_node ? std::vector<NodeId>{kRouterNode} : AttentionNodes();
    for (const NodeId router : routers) {
      if (!world_.alive(router)) continue;
      CHECK(world_.node(router)
                .Post(runtime::kRouter, router::PlacementUpdate{MakePlacement()})
                .ok());
    }
  });
}

std::vector<uint64_t> ClusterSim::items_served() const {
  std::vector<uint64_t> served(options_.expert_workers);
  for (const auto& [worker, counters] : expert_counters_) served[worker] += counters->items_served;
  return served;
}

std::vector<NodeId> ClusterSim::nodes() const {
  std::vector<NodeId> nodes = AttentionNodes();
  if (options_.router_on_own_node) nodes.push_back(kRouterNode);
  if (options_.experts_in_attention_node) return nodes;
  for (int w = 0; w < options_.expert_workers; ++w) nodes.push_back(ExpertNode(w));
  return nodes;
}

attention_worker::AttentionCounters ClusterSim::counters() const {
  attention_worker::AttentionCounters sum;
  for (const auto& [node, actor] : attention_) {
    const attention_worker::AttentionCounters one = actor->counters();
    sum.steps += one.steps;
    sum.requests += one.requests;
    sum.preemptions += one.preemptions;
    sum.route_requests += one.route_requests;
    sum.route_resends += one.route_resends;
    sum.route_rejected += one.route_rejected;
    sum.running += one.running;
    sum.waiting += one.waiting;
    sum.blocks_used += one.blocks_used;
  }
  return sum;
}

uint64_t ClusterSim::replays() const {
  uint64_t replays = 0;
  for (const auto& [id, stream] : streams_) {
    replays += std::max<uint64_t>(stream.journal.attempts(), 1) - 1;
  }
  return replays;
}

void ClusterSim::Generate(uint64_t id, const OracleRequest& request, runtime::Duration delay) {
  CHECK(streams_.find(id) == streams_.end());
  streams_[id].request = request;
  world_.Schedule(delay, [this, id] {
    if (streams_[id].finish == FinishReason::kNone) Attempt(id);
  });
}

void ClusterSim::Attempt(uint64_t id) {
  ClientStream& stream = streams_[id];
  // The one alive that has the fewest streams, rather one without a suspect; suspects join no
  // other. With none, the stream waits.
  stream.node = NodeId(0);
  std::pair<bool, size_t> best;
  for (const auto& [node, actor] : attention_) {
    std::pair<bool, size_t> rank;
    for (const auto& [other_id, other] : streams_) {
      if (other_id == id || other.node != node || other.finish != FinishReason::kNone) continue;
      rank.first = rank.first || other.journal.suspect();
      ++rank.second;
    }
    if (stream.journal.suspect() && rank.first) continue;
    if (stream.node != NodeId(0) && !(rank < best)) continue;
    stream.node = node;
    best = rank;
  }
  if (stream.node == NodeId(0)) {
    world_.Schedule(milliseconds(5), [this, id] {
      if (streams_[id].finish == FinishReason::kNone) Attempt(id);
    });
    return;
  }
  stream.journal.BeginAttempt();
  stream.attempt = RequestId(++attempts_);
  attention_worker::Submit submit;
  submit.request = stream.attempt;
  submit.prompt = stream.request.prompt;
  submit.generated = stream.journal.generated();
  submit.sampling = stream.request.sampling;
  submit.max_tokens = stream.request.max_tokens;
  submit.ignore_eos = stream.request.eos_token_ids.empty();
  submit.on_token = [this, id,
                     attempt = stream.attempt](const attention_worker::TokenEvent& event) {
    // In order, each some time after it was sent.
    ClientStream& to = streams_[id];
    if (to.attempt != attempt) return;
    to.arrival = std::max(to.arrival, world_.Now()) + microseconds(arrivals_.Below(500));
    world_.Schedule(to.arrival - world_.Now(),
                    [this, id, attempt, event] { Arrived(id, attempt, event); });
  };
  // As the worker's gRPC handler does: it posts the request once its first beat is on the way.
  attention_worker::Ping ping;
  ping.on_pong = [this, id, attempt = stream.attempt, node = stream.node, submit] {
    world_.Schedule(microseconds(1), [this, id, attempt, node, submit] {
      ClientStream& to = streams_[id];
      // A beat that is on the way arrives, whatever becomes of the worker.
      to.arrival = world_.Now() + microseconds(arrivals_.Below(500));
      world_.Schedule(to.arrival - world_.Now(), [this, id, attempt] {
        if (streams_[id].attempt == attempt) streams_[id].journal.TakenAboard();
      });
      if (attention_.count(node) == 0) return;
      if (!world_.node(node).Post(runtime::kAttentionWorker, submit).ok()) return;
      if (const auto poison = poison_.find(id); poison != poison_.end()) {
        CrashAttention(node, poison->second, milliseconds(10));
      }
    });
  };
  CHECK(world_.node(stream.node).Post(runtime::kAttentionWorker, ping).ok());
}

void ClusterSim::Arrived(uint64_t id, RequestId attempt,
                         const attention_worker::TokenEvent& event) {
  ClientStream& stream = streams_[id];
  if (stream.attempt != attempt || stream.cancelled) return;  // of a dead worker, too late
  if (event.finish_reason == FinishReason::kError) return AttemptEnded(id, event.status);
  const bool last = event.finish_reason != FinishReason::kNone;
  stream.orderly &= stream.finish == FinishReason::kNone &&
                    stream.journal.Record(event.index, event.token, last).ok();
  if (event.token >= 0) stream.tokens.push_back({event.token, event.logprob, event.row_digest});
  stream.finish = event.finish_reason;
  stream.status = event.status;
  stream.preemptions = event.preemptions;
}

void ClusterSim::AttemptEnded(uint64_t id, const absl::Status& status) {
  ClientStream& stream = streams_[id];
  stream.node = NodeId(0);
  stream.attempt = RequestId(0);
  if (stream.cancelled) return Cancelled(stream);
  stream.status = stream.journal.AttemptEnded(status);
  if (stream.status.ok()) return Attempt(id);
  stream.finish = FinishReason::kError;
}

void ClusterSim::Cancelled(ClientStream& stream) {
  stream.finish = FinishReason::kCancelled;
  stream.status = absl::CancelledError("cancelled");
}

void ClusterSim::Cancel(uint64_t id, runtime::Duration delay) {
  world_.Schedule(delay, [this, id] {
    ClientStream& stream = streams_[id];
    if (stream.finish != FinishReason::kNone) return;
    // The client is told at once; what the worker still sends reaches nobody.
    stream.cancelled = true;
    Cancelled(stream);
    if (attention_.count(stream.node) == 0) return;
    CHECK(world_.node(stream.node)
              .Post(runtime::kAttentionWorker, attention_worker::Cancel{stream.attempt})
              .ok());
  });
}

void ClusterSim::CrashAttention(NodeId node, runtime::Duration delay, runtime::Duration down) {
  world_.Schedule(delay, [this, node, down] {
    if (!world_.alive(node)) return;
    attention_.erase(node);
    world_.Crash(node);
    for (const auto& [id, stream] : streams_) {
      if (stream.node != node || stream.finish != FinishReason::kNone) continue;
      // What is under way may arrive until the connection is known to be broken.
      world_.Schedule(microseconds(arrivals_.Below(20'000)),
                      [this, id = id, attempt = stream.attempt] {
                        const ClientStream& broken = streams_[id];
                        if (broken.attempt != attempt || broken.finish != FinishReason::kNone)
                          return;
                        AttemptEnded(id, absl::UnavailableError("connection lost"));
                      });
    }
    world_.Schedule(down, [this, node] { world_.Restart(node); });
  });
}

bool ClusterSim::RunToEnd(runtime::Duration limit) {
  return world_.RunUntil(
      [this] {
        return std::all_of(streams_.begin(), streams_.end(), [](const auto& stream) {
          return stream.second.finish != FinishReason::kNone;
        });
      },
      limit);
}

std::string ClusterSim::Imbalance(runtime::Duration quiet) {
  // Late answers, acknowledgements and the last step of a cancelled request find their way home.
  world_.RunFor(quiet);
  std::string out;
  const attention_worker::AttentionCounters counts = counters();
  if (counts.blocks_used != 0) absl::StrAppend(&out, counts.blocks_used, " cache blocks held; ");
  if (counts.running + counts.waiting != 0) absl::StrAppend(&out, "sequences aboard; ");
  for (const NodeId id : nodes()) {
    if (!world_.alive(id)) continue;
    if (const uint32_t buffers = world_.pool(id).in_use(); buffers != 0) {
      absl::StrAppend(&out, "node ", id.value(), " holds ", buffers, " buffers; ");
    }
    if (const uint64_t frames = world_.node(id).outstanding_frames(); frames != 0) {
      absl::StrAppend(&out, "node ", id.value(), " misses ", frames, " credits; ");
    }
  }
  return out;
}

}  // namespace moebius::cluster_test
