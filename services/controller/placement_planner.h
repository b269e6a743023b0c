#pragma once

// Decides which expert workers host which expert. A pure function, free of gRPC: deterministic, for
// any number of workers (no divisibility), moving as little as it can from the placement before.
//
//   1. Units are gate groups of a layer (a token's experts of one group then lie together, so that
//      its row goes to few destinations). With more workers than groups, or an uneven count, groups
//      are cut where balance asks.
//   2. Every worker gets its share of each layer, within one expert of the others: load follows the
//      tokens, and every token visits every layer.
//   3. An expert stays where it is while its host is within its share.
//   4. Replicas of an expert lie on different workers, as many as there can be.

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace moebius::services {

// What one worker hosts: experts[layer][i] = expert, ascending.
struct WorkerShare {
  uint64_t node = 0;
  std::vector<std::vector<uint32_t>> experts;  // [layers]; empty for dense layers
};

struct PlanInput {
  std::vector<bool> moe_layers;  // [layers]
  uint32_t experts_per_layer = 0;
  uint32_t group_size = 1;  // experts of one gate group
  uint32_t replicas = 1;    // of each expert; at most one on a worker
};

// One share for each of `nodes` (in ascending order). `before` may name nodes that are gone.
// REQUIRES: nodes not empty, ascending, distinct.
std::vector<WorkerShare> PlanPlacement(const PlanInput& input, absl::Span<const uint64_t> nodes,
                                       absl::Span<const WorkerShare> before);

}  // namespace moebius::services
