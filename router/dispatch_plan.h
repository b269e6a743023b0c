#pragma once

// Choosing a replica for each (row, expert) pair. A pure function of the placement, the pairs and
// the known state of the destinations: deterministic, and free as far as results go (experts are
// pure: any choice gives the same bits). It decides bytes and load only:
//   - a pair goes to a destination that this row goes to anyway, if there is one: a row travels
//   once per
//     destination, and a planner that keeps gate groups together then needs few of them;
//   - otherwise to the destination with the least load (rows outstanding there plus rows of this
//   plan), ties to
//     the placement's order of preference;
//   - slow destinations only when nobody else hosts the expert; down or excluded ones never.

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "base/ids.h"
#include "router/placement.h"

namespace moebius::router {

enum class DestinationState : uint8_t { kUp, kSlow, kDown };

// Somebody who hosts experts. Indices into the destination table are stable for one placement.
struct Destination {
  runtime::ActorAddress address;
  DestinationState state = DestinationState::kDown;
  uint64_t outstanding_items = 0;
};

// The placement with replicas as indices into a destination table.
class ReplicaTable {
 public:
  // Collects every address of `placement` in ascending order.
  void Build(const Placement& placement, std::vector<Destination>& destinations);
  absl::Span<const uint16_t> Replicas(uint32_t layer, uint32_t expert) const;
  bool built() const { return experts_ != 0; }

 private:
  uint32_t experts_ = 0;
  std::vector<uint32_t> begin_;  // [layers * experts + 1]
  std::vector<uint16_t> replicas_;
};

inline constexpr uint16_t kNoDestination = UINT16_MAX;

// One pair to place. `avoid` holds up to two destinations that must not be chosen (asked before).
struct PlanItem {
  uint32_t row = 0;
  uint32_t expert = 0;
  uint16_t avoid[2] = {kNoDestination, kNoDestination};
  uint16_t destination = kNoDestination;  // out: kNoDestination if nobody can take it now
};

// A (destination, layer, expert) that answered NOT_HOSTED under the current placement.
struct Exclusion {
  uint16_t destination = 0;
  uint32_t layer = 0;
  uint32_t expert = 0;
};

// Fills `destination` of each item. REQUIRES: items of one row are adjacent. `load` is scratch of
// one entry per destination.
void PlanDispatch(const ReplicaTable& replicas, absl::Span<const Destination> destinations,
                  absl::Span<const Exclusion> exclusions, uint32_t layer,
                  absl::Span<PlanItem> items, std::vector<uint64_t>& load);

}  // namespace moebius::router
