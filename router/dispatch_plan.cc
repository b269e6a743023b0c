#include "router/dispatch_plan.h"

#include <algorithm>

#include "base/check.h"

namespace moebius::router {

void ReplicaTable::Build(const Placement& placement, std::vector<Destination>& destinations) {
  destinations.clear();
  experts_ = placement.experts_per_layer();
  const auto each = [&](const auto& visit) {
    for (uint32_t layer = 0; layer < placement.layers(); ++layer) {
      for (uint32_t expert = 0; expert < experts_; ++expert) {
        visit(placement.Replicas(LayerId(layer), ExpertId(expert)));
      }
    }
  };
  std::vector<runtime::ActorAddress> addresses;
  each([&](absl::Span<const runtime::ActorAddress> replicas) {
    addresses.insert(addresses.end(), replicas.begin(), replicas.end());
  });
  std::sort(addresses.begin(), addresses.end());
  addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
  CHECK_LT(addresses.size(), size_t{kNoDestination});
  for (const runtime::ActorAddress& address : addresses) {
    destinations.push_back(Destination{address, DestinationState::kDown, 0});
  }
  begin_.clear();
  replicas_.clear();
  each([&](absl::Span<const runtime::ActorAddress> replicas) {
    begin_.push_back(static_cast<uint32_t>(replicas_.size()));
    for (const runtime::ActorAddress& address : replicas) {
      const auto at = std::lower_bound(addresses.begin(), addresses.end(), address);
      replicas_.push_back(static_cast<uint16_t>(at - addresses.begin()));
    }
  });
  begin_.push_back(static_cast<uint32_t>(replicas_.size()));
}

absl::Span<const uint16_t> ReplicaTable::Replicas(uint32_t layer, uint32_t expert) const {
  const size_t index = size_t{layer} * experts_ + expert;
  if (experts_ == 0 || expert >= experts_ || index + 1 >= begin_.size()) return {};
  return absl::MakeConstSpan(replicas_.data() + begin_[index], begin_[index + 1] - begin_[index]);
}

void PlanDispatch(const ReplicaTable& replicas, absl::Span<const Destination> destinations,
                  absl::Span<const Exclusion> exclusions, uint32_t layer,
                  absl::Span<PlanItem> items, PlanScratch& scratch) {
  std::vector<uint64_t>& load = scratch.load;
  const size_t experts = replicas.experts();
  scratch.reads.assign(destinations.size() * experts, 0);
  load.clear();
  for (const Destination& destination : destinations) load.push_back(destination.outstanding_items);
  size_t row_begin = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    PlanItem& item = items[i];
    if (items[row_begin].row != item.row) row_begin = i;
    item.destination = kNoDestination;
    bool best_slow = true;
    bool best_used = false;
    uint64_t best_cost = 0;
    for (uint16_t candidate : replicas.Replicas(layer, item.expert)) {
      const Destination& destination = destinations[candidate];
      if (destination.state == DestinationState::kDown || candidate == item.avoid[0] ||
          candidate == item.avoid[1]) {
        continue;
      }
      const bool excluded =
          std::any_of(exclusions.begin(), exclusions.end(), [&](const Exclusion& e) {
            return e.destination == candidate && e.layer == layer && e.expert == item.expert;
          });
      if (excluded) continue;
      const bool slow = destination.state == DestinationState::kSlow;
      bool used = false;
      for (size_t j = row_begin; j < i; ++j) used = used || items[j].destination == candidate;
      const bool reads = scratch.reads[candidate * experts + item.expert] != 0;
      const uint64_t cost = load[candidate] + (reads ? 0 : kWeightsInRows);
      const bool better = item.destination == kNoDestination || (best_slow && !slow) ||
                          (best_slow == slow && used && !best_used) ||
                          (best_slow == slow && used == best_used && cost < best_cost);
      if (better) {
        item.destination = candidate;
        best_slow = slow;
        best_used = used;
        best_cost = cost;
      }
    }
    if (item.destination == kNoDestination) continue;
    scratch.reads[item.destination * experts + item.expert] = 1;
    ++load[item.destination];
  }
}

}  // namespace moebius::router
