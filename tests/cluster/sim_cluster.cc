#include "tests/cluster/sim_cluster.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "tests/cluster/oracle_router.h"

namespace moebius::cluster_test {
namespace {

using attention_worker::FinishReason;

constexpr uint64_t kModelDigest = 0x70'1D'16E5'7;

runtime::NodeOptions NodeOptionsFor(wire::NodeRole role) {
  runtime::NodeOptions options;
  options.identity.role = role;
  options.identity.model_digest = {kModelDigest, 0};
  return options;
}

}  // namespace

SimCluster::SimCluster(const SimClusterOptions& options)
    : options_(options), world_(options.seed, options.network) {
  const std::vector<runtime::BufferClass> buffers = {{512, 64}, {8192, 32}, {160 * 1024, 32}};
  attention_worker::AttentionOptions attention = options.attention;
  attention.model_digest = kModelDigest;
  attention.router = {options.router_on_own_node ? kRouterNode : kAttentionNode, runtime::kRouter};
  if (options.router_on_own_node) {
    attention.router_peer = runtime::PeerInfo{kRouterNode, Incarnation(0),
                                              runtime::sim::SimWorld::AddressOf(kRouterNode)};
    world_.AddNode(kRouterNode, NodeOptionsFor(wire::NodeRole::kRouter), buffers,
                   [this](runtime::Node& node) { AddRouterActor(node); });
  }
  world_.AddNode(kAttentionNode, NodeOptionsFor(wire::NodeRole::kAttention), buffers,
                 [this, attention](runtime::Node& node) {
                   auto actor = std::make_unique<attention_worker::AttentionActor>(
                       attention_worker::AttentionModel{.config = &options_.model->config(),
                                                        .weights = &options_.model->weights(),
                                                        .backend = NewBackend()},
                       attention);
                   attention_ = actor.get();
                   node.AddActor(runtime::kAttentionWorker, std::move(actor));
                   if (!options_.router_on_own_node) AddRouterActor(node);
                 });
}

kernels::Backend* SimCluster::NewBackend() {
  backends_.push_back(MakeTestBackend());
  return backends_.back().get();
}

void SimCluster::AddRouterActor(runtime::Node& node) {
  node.AddActor(runtime::kRouter, std::make_unique<OracleRouter>(options_.model, NewBackend()));
}

std::vector<NodeId> SimCluster::nodes() const {
  std::vector<NodeId> nodes = {kAttentionNode};
  if (options_.router_on_own_node) nodes.push_back(kRouterNode);
  return nodes;
}

void SimCluster::Generate(uint64_t id, const OracleRequest& request, runtime::Duration delay) {
  CHECK(streams_.find(id) == streams_.end());
  ClientStream& stream = streams_[id];
  stream.request = request;
  attention_worker::Submit submit;
  submit.request = RequestId(id);
  submit.prompt = request.prompt;
  submit.sampling = request.sampling;
  submit.max_tokens = request.max_tokens;
  submit.ignore_eos = request.eos_token_ids.empty();
  submit.on_token = [&stream](const attention_worker::TokenEvent& event) {
    stream.orderly &= stream.finish == FinishReason::kNone && event.index == stream.tokens.size();
    if (event.token >= 0) stream.tokens.push_back({event.token, event.logprob, event.row_digest});
    stream.finish = event.finish_reason;
    stream.status = event.status;
    stream.preemptions = event.preemptions;
  };
  world_.Schedule(delay, [this, submit] {
    CHECK(world_.node(kAttentionNode).Post(runtime::kAttentionWorker, submit).ok());
  });
}

void SimCluster::Cancel(uint64_t id, runtime::Duration delay) {
  world_.Schedule(delay, [this, id] {
    CHECK(world_.node(kAttentionNode)
              .Post(runtime::kAttentionWorker, attention_worker::Cancel{RequestId(id)})
              .ok());
  });
}

bool SimCluster::RunToEnd(runtime::Duration limit) {
  return world_.RunUntil(
      [this] {
        return std::all_of(streams_.begin(), streams_.end(), [](const auto& stream) {
          return stream.second.finish != FinishReason::kNone;
        });
      },
      limit);
}

std::string SimCluster::Imbalance(runtime::Duration quiet) {
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
