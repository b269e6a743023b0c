#include "services/controller/placement_planner.h"

#include <algorithm>

#include "base/check.h"

namespace moebius::services {
namespace {

// One layer's placement while it is made. Workers are indices into the plan's nodes.
class LayerPlan {
 public:
  // Shares differ by at most one expert; who gets the larger ones rotates with the layer, so that
  // bytes even out.
  LayerPlan(const PlanInput& input, size_t layer, uint32_t workers)
      : input_(input),
        layer_(layer),
        replicas_(std::min(std::max(input.replicas, 1u), workers)),
        copies_(input.experts_per_layer, 0),
        quota_(workers),
        kept_(workers, 0),
        held_(workers) {
    const uint32_t slots = input.experts_per_layer * replicas_;
    for (uint32_t w = 0; w < workers; ++w) {
      quota_[w] = slots / workers + ((w + layer) % workers < slots % workers ? 1 : 0);
    }
  }

  // Unless the expert or the worker has enough.
  void Keep(uint32_t worker, uint32_t expert) {
    if (expert >= copies_.size() || copies_[expert] == replicas_ || !HasRoom(worker)) return;
    if (Holds(worker, expert)) return;
    Place(worker, expert);
    ++kept_[worker];
  }

  // What is left goes group by group to whoever already holds most of that group and has room, else
  // to the one with the most room; ties to the first one, counted from another worker in each
  // layer, so that the replicas of what one worker holds do not all lie with the same other one.
  void PlaceTheRest() {
    for (uint32_t expert = 0; expert < copies_.size(); ++expert) {
      while (copies_[expert] < replicas_) {
        const uint32_t best = BestFor(expert);
        if (best < workers()) {
          Place(best, expert);
        } else {
          CHECK(PlaceByExchange(expert));
        }
      }
    }
  }

  std::vector<uint32_t> Experts(uint32_t worker) const {
    std::vector<uint32_t> experts = held_[worker];
    std::sort(experts.begin(), experts.end());
    return experts;
  }

 private:
  uint32_t workers() const { return static_cast<uint32_t>(held_.size()); }
  bool HasRoom(uint32_t worker) const { return held_[worker].size() < quota_[worker]; }
  bool Holds(uint32_t worker, uint32_t expert) const {
    return std::find(held_[worker].begin(), held_[worker].end(), expert) != held_[worker].end();
  }
  void Place(uint32_t worker, uint32_t expert) {
    held_[worker].push_back(expert);
    ++copies_[expert];
  }

  // workers() if whoever has room holds it already.
  uint32_t BestFor(uint32_t expert) const {
    uint32_t best = workers();
    uint64_t best_score = 0;
    for (uint32_t i = 0; i < workers(); ++i) {
      const auto w = static_cast<uint32_t>((i + layer_) % workers());
      if (!HasRoom(w) || Holds(w, expert)) continue;
      const uint32_t group = expert / input_.group_size;
      uint64_t same = 0;
      for (uint32_t other : held_[w]) same += other / input_.group_size == group ? 1 : 0;
      const uint64_t score = (same << 32) + (quota_[w] - held_[w].size()) + 1;
      if (score > best_score) {
        best = w;
        best_score = score;
      }
    }
    return best;
  }

  // A full worker without the expert hands another one to a worker that has room: rather one that
  // it was given just now than one that it holds already. There is one to hand over: shares differ
  // by at most one, so the full worker holds at least as many as the other, and the other holds
  // `expert`, which it does not.
  bool PlaceByExchange(uint32_t expert) {
    for (const bool kept_too : {false, true}) {
      for (uint32_t to = 0; to < workers(); ++to) {
        if (!HasRoom(to)) continue;
        for (uint32_t from = 0; from < workers(); ++from) {
          if (Holds(from, expert)) continue;
          std::vector<uint32_t>& full = held_[from];
          const auto begin = full.begin() + (kept_too ? 0 : kept_[from]);
          const auto moved =
              std::find_if(begin, full.end(), [&](uint32_t other) { return !Holds(to, other); });
          if (moved == full.end()) continue;
          held_[to].push_back(*moved);
          *moved = expert;
          ++copies_[expert];
          return true;
        }
      }
    }
    return false;
  }

  const PlanInput& input_;
  const size_t layer_;
  const uint32_t replicas_;
  std::vector<uint32_t> copies_;             // of each expert
  std::vector<uint32_t> quota_;              // of each worker
  std::vector<int64_t> kept_;                // by each worker from before: the first of held_
  std::vector<std::vector<uint32_t>> held_;  // by each worker
};

}  // namespace

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
    LayerPlan plan(input, layer, workers);
    for (uint32_t w = 0; w < workers; ++w) {
      const auto old = std::find_if(before.begin(), before.end(), [&](const WorkerShare& share) {
        return share.node == nodes[w];
      });
      if (old == before.end() || layer >= old->experts.size()) continue;
      for (uint32_t expert : old->experts[layer]) plan.Keep(w, expert);
    }
    plan.PlaceTheRest();
    for (uint32_t w = 0; w < workers; ++w) shares[w].experts[layer] = plan.Experts(w);
  }
  return shares;
}

}  // namespace moebius::services
