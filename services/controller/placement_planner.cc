#include "services/controller/placement_planner.h"

#include <algorithm>

#include "base/check.h"

namespace moebius::services {

std::vector<WorkerShare> PlanPlacement(const PlanInput& input, absl::Span<const uint64_t> nodes,
                                       absl::Span<const WorkerShare> before) {
  CHECK(!nodes.empty());
  const uint32_t workers = static_cast<uint32_t>(nodes.size());
  const size_t layers = input.moe_layers.size();
  std::vector<WorkerShare> shares(workers);
  for (uint32_t w = 0; w < workers; ++w) {
    shares[w].node = nodes[w];
    shares[w].experts.resize(layers);
  }
  for (size_t layer = 0; layer < layers; ++layer) {
    if (!input.moe_layers[layer]) continue;
    // Shares differ by at most one expert; who gets the larger ones rotates with the layer, so that
    // bytes even out.
    const uint32_t base = input.experts_per_layer / workers;
    const uint32_t extra = input.experts_per_layer % workers;
    std::vector<uint32_t> quota(workers);
    for (uint32_t w = 0; w < workers; ++w) {
      quota[w] = base + ((w + layer) % workers < extra ? 1 : 0);
    }
    std::vector<bool> placed(input.experts_per_layer, false);
    for (uint32_t w = 0; w < workers; ++w) {
      const auto old = std::find_if(before.begin(), before.end(), [&](const WorkerShare& share) {
        return share.node == nodes[w];
      });
      if (old == before.end() || layer >= old->experts.size()) continue;
      for (uint32_t expert : old->experts[layer]) {
        if (expert >= input.experts_per_layer || placed[expert]) continue;
        if (shares[w].experts[layer].size() >= quota[w]) break;
        shares[w].experts[layer].push_back(expert);
        placed[expert] = true;
      }
    }
    // What is left goes group by group to whoever already holds most of that group and has room,
    // else to the one with the most room; ties to the lower worker.
    for (uint32_t expert = 0; expert < input.experts_per_layer; ++expert) {
      if (placed[expert]) continue;
      const uint32_t group = expert / input.group_size;
      uint32_t best = workers;
      uint64_t best_score = 0;
      for (uint32_t w = 0; w < workers; ++w) {
        const auto& held = shares[w].experts[layer];
        if (held.size() >= quota[w]) continue;
        uint64_t same = 0;
        for (uint32_t other : held) same += other / input.group_size == group ? 1 : 0;
        const uint64_t score = (same << 32) + (quota[w] - held.size()) + 1;
        if (score > best_score) {
          best = w;
          best_score = score;
        }
      }
      CHECK_LT(best, workers);  // the quotas sum to the number of experts
      shares[best].experts[layer].push_back(expert);
    }
    for (WorkerShare& share : shares)
      std::sort(share.experts[layer].begin(), share.experts[layer].end());
  }
  return shares;
}

}  // namespace moebius::services
