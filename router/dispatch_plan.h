#pragma once

// Choosing a replica for each (row, expert) pair. A pure function of the placement, the pairs and
// the known state of the destinations: deterministic, and free as far as results go (experts are
// pure: any choice gives the same bits). It decides bytes and load only:
//   - a pair goes to a destination that this row goes to anyway, if there is one: a row travels
//   once
//     per destination, and a planner that keeps gate groups together then needs few of them;
//   - otherwise to the destination with the least load, in rows: those outstanding there, those of
//     this plan, and so many more as the expert's weights are worth if this plan does not make it
//     read them yet. So the few rows of a decoding step that share an expert share a replica, and
//     many rows are spread. Ties: the placement's order;
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
  uint32_t experts() const { return experts_; }
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

// Reading an expert's weights costs as much as so many rows. Of the grouped FFN's own cost it is
// 260 and more on an H200 (from the times of 1, 64 and 128 rows an expert, docs/kernels-cuda.md); a
// CPU, not measured for this, has less of memory and much less of arithmetic.
inline constexpr uint64_t kWeightsInRows = 32;

// Memory of PlanDispatch between calls: after the first ones it allocates nothing.
struct PlanScratch {
  std::vector<uint64_t> load;  // [destinations]
  std::vector<uint8_t> reads;  // [destinations, experts]: the plan makes it read that expert
};

// Fills `destination` of each item. REQUIRES: items of one row are adjacent.
void PlanDispatch(const ReplicaTable& replicas, absl::Span<const Destination> destinations,
                  absl::Span<const Exclusion> exclusions, uint32_t layer,
                  absl::Span<PlanItem> items, PlanScratch& scratch);

}  // namespace moebius::router
