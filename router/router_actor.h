#pragma once

// The router: gates token rows, sends each to the experts chosen for it, and sums what comes back
// in an order that depends on expert ids alone. One more pure function behind an address: it keeps
// nothing between requests, so after its death a request is sent again, to any router.
//
// Receives: kRouteRequest and kRouteAbandon from attention workers (proto/wire/route.h), kCombine
// and kNotHosted from expert workers (proto/wire/dispatch.h), Posted{PlacementUpdate}
// (router/placement.h).
//
// An answer counts if and only if it matches an outstanding pair of this incarnation: the round's
// generation, step, layer and lane, the row, the expert, and a destination it was asked of. The
// epoch says where to ask, never whether an answer is true. Anything else is dropped and counted. A
// second answer for a pair that is done is compared with the first, bit by bit, before it is
// dropped.
//
// Loss: when a link goes down only the pairs waiting there are sent again. A pair that is slow is
// asked of a replica too; the first answer wins. A worker without the shard answers kNotHosted and
// the pair is planned again. With no replica left the pair waits for the next placement or link. A
// partial sum is never used.
//
// Bounds: `max_rounds` requests at once; over it a request is dropped and counted (its sender asks
// again). No allocation per request after warm-up.
//
// Threading: an Actor; counters() from any thread.

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "router/dispatch_plan.h"
#include "router/placement.h"
#include "router/round.h"
#include "router/router_options.h"
#include "runtime/actor.h"

namespace moebius::router {

class RouterActor final : public runtime::Actor {
 public:
  // `backend` and the weights of `options` are borrowed; the backend is used by this actor's
  // compute alone.
  RouterActor(RouterOptions options, kernels::Backend* backend);
  ~RouterActor() override;
  void Receive(runtime::Message message, runtime::Context& context) override;
  std::shared_ptr<const RouterCounters> counters() const { return counters_; }

 private:
  // Recent answer times of one destination, for the hedge deadline.
  struct AnswerTimes {
    std::array<int64_t, 32> ns{};
    uint32_t count = 0;
  };

  void OnRequest(runtime::FrameReceived received, runtime::Context& context);
  void OnAbandon(const runtime::FrameReceived& received, runtime::Context& context);
  void OnAnswer(runtime::FrameReceived received, runtime::Context& context);
  void OnComputeDone(const runtime::ComputeDone& done, runtime::Context& context);
  void OnLinkChanged(const runtime::LinkChanged& change, runtime::Context& context);
  void OnPlacement(const PlacementUpdate& update, runtime::Context& context);
  void OnTick(runtime::Context& context);

  absl::Status Gate(Round& round);
  absl::Status Combine(Round& round);
  // Plans and sends every pair that is neither done nor waiting; what cannot leave now stays
  // unsent.
  void SendUnsent(Round& round, runtime::Context& context);
  // Sends the planned items of one destination; false if it refused.
  bool SendFrame(Round& round, uint16_t destination, absl::Span<const PlanItem> items,
                 runtime::Context& context);
  void MarkAsked(Round& round, const PlanItem& item, runtime::TimePoint now);
  void ForgetAsked(RoundItem& item, uint16_t destination);
  void MaybeCombine(Round& round, runtime::Context& context);
  void Reply(Round& round, runtime::Context& context);
  void Free(Round& round);
  void EnsureTick(runtime::Context& context);
  size_t SlotOf(const Round& round) const { return static_cast<size_t>(&round - rounds_.data()); }
  runtime::Duration HedgeAfter(uint16_t destination) const;
  uint16_t FindDestination(const runtime::ActorAddress& address) const;
  size_t ItemIndex(const Round& round, uint32_t row, uint32_t expert) const;
  void LoseDestination(uint16_t destination, runtime::Context& context);

  const RouterOptions options_;
  kernels::Backend* const backend_;
  const uint32_t top_k_;
  std::shared_ptr<RouterCounters> counters_;
  std::vector<Round> rounds_;
  std::vector<Bf16> zero_row_;
  uint64_t next_generation_ = 1;
  bool ticking_ = false;

  std::shared_ptr<const Placement> placement_;
  ReplicaTable replicas_;
  std::vector<Destination> destinations_;
  std::vector<AnswerTimes> answer_times_;  // [destinations]
  std::vector<Exclusion> exclusions_;
  std::vector<std::pair<NodeId, DestinationState>> links_;  // last known state of each remote node
  std::vector<PlanItem> plan_;
  std::vector<PlanItem> share_;
  PlanScratch plan_scratch_;
};

}  // namespace moebius::router
