#pragma once

// Who hosts which expert: an immutable snapshot, swapped whole between micro-batches. The
// controller publishes it; the composition root posts it to the router as PlacementUpdate. The
// epoch says where to ask, never whether an answer is true: experts are pure.

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "base/ids.h"
#include "runtime/context.h"
#include "runtime/message.h"

namespace moebius::router {

class Placement {
 public:
  // `layers` is the number of layers incl. dense and MTP ones (dense layers have no entries).
  Placement(Epoch epoch, uint32_t layers, uint32_t experts_per_layer)
      : epoch_(epoch), experts_(experts_per_layer), replicas_(size_t{layers} * experts_per_layer) {}

  // Adds a replica; order is the planner's order of preference among equals.
  void AddReplica(LayerId layer, ExpertId expert, const runtime::ActorAddress& address) {
    replicas_[Index(layer, expert)].push_back(address);
  }
  void AddPeer(const runtime::PeerInfo& peer) { peers_.push_back(peer); }

  Epoch epoch() const { return epoch_; }
  uint32_t experts_per_layer() const { return experts_; }
  uint32_t layers() const { return static_cast<uint32_t>(replicas_.size() / experts_); }
  // Empty when nobody hosts it (its rows wait for a later snapshot).
  absl::Span<const runtime::ActorAddress> Replicas(LayerId layer, ExpertId expert) const {
    return replicas_[Index(layer, expert)];
  }
  // Every remote node named by a replica, with where to reach it.
  absl::Span<const runtime::PeerInfo> Peers() const { return peers_; }

 private:
  size_t Index(LayerId layer, ExpertId expert) const {
    return size_t{layer.value()} * experts_ + expert.value();
  }
  Epoch epoch_;
  uint32_t experts_;
  std::vector<std::vector<runtime::ActorAddress>> replicas_;
  std::vector<runtime::PeerInfo> peers_;
};

// Posted to the router. Ignored unless its epoch is newer than the one in use.
struct PlacementUpdate {
  std::shared_ptr<const Placement> placement;
};

}  // namespace moebius::router
