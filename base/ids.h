#pragma once

// Strong identifiers: two integers that can be swapped will be, so each kind has its own type.
// `id.value()` is the number; comparison and hashing (absl and std) work; there is no arithmetic.

#include <compare>
#include <cstdint>
#include <functional>
#include <utility>

namespace moebius {

template <typename Tag, typename Integer>
class StrongId {
 public:
  using ValueType = Integer;
  constexpr StrongId() = default;
  constexpr explicit StrongId(Integer value) : value_(value) {}
  constexpr Integer value() const { return value_; }
  friend constexpr auto operator<=>(StrongId, StrongId) = default;
  template <typename H>
  friend H AbslHashValue(H h, StrongId id) {
    return H::combine(std::move(h), id.value_);
  }

 private:
  Integer value_ = 0;
};

using NodeId = StrongId<struct NodeIdTag, uint64_t>;            // one process of ours; 0 = none
using Incarnation = StrongId<struct IncarnationTag, uint64_t>;  // restart number of a node; 0 = any
using ActorId = StrongId<struct ActorIdTag, uint16_t>;          // an actor within its node
using RequestId = StrongId<struct RequestIdTag, uint64_t>;      // a generation request
using StepId = StrongId<struct StepIdTag, uint64_t>;      // one iteration of an attention worker
using LayerId = StrongId<struct LayerIdTag, uint32_t>;    // as in "model.layers.<LayerId>."
using ExpertId = StrongId<struct ExpertIdTag, uint32_t>;  // routed expert within its layer
using Epoch = StrongId<struct EpochTag, uint64_t>;        // version of the placement
using LaneId = StrongId<struct LaneIdTag, uint16_t>;      // micro-batch of a step
using TokenId = int32_t;  // a vocabulary id; plain, as every tokenizer and API has it

}  // namespace moebius

template <typename Tag, typename Integer>
struct std::hash<moebius::StrongId<Tag, Integer>> {
  size_t operator()(moebius::StrongId<Tag, Integer> id) const {
    return std::hash<Integer>()(id.value());
  }
};
