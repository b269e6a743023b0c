#pragma once

// One kRouteRequest on its way: the rows, what the gate chose, what was asked of whom, what has
// come back. Rounds live in fixed slots of the router; every vector is sized once for the largest
// request.

#include <cstdint>
#include <vector>

#include "base/float_formats.h"
#include "base/ids.h"
#include "router/dispatch_plan.h"
#include "runtime/clock.h"
#include "runtime/message.h"

namespace moebius::router {

enum class RoundPhase : uint8_t {
  kFree,
  kGating,     // compute in flight: gate, selection, quantisation
  kWaiting,    // pairs are with expert workers, or wait to be sent
  kCombining,  // compute in flight: the canonical sum
  kReplying,   // the answer waits for a buffer or a credit
  kDoomed,     // replaced or unwanted while compute was in flight: freed when that ends
};

// One (row, slot) pair. Slots of a row are in ascending expert id.
struct RoundItem {
  bool done = false;
  bool waits = false;  // asked and not answered
  uint8_t attempts = 0;
  // Whom it was asked of: the live attempts. An answer from anybody else is not accepted.
  uint16_t asked[2] = {kNoDestination, kNoDestination};
  runtime::TimePoint asked_at;
  runtime::TimePoint first_asked_at;
};

struct Round {
  RoundPhase phase = RoundPhase::kFree;
  uint64_t generation = 0;  // of this use of the slot: makes late answers recognisable
  runtime::ActorAddress from;
  runtime::Frame request;
  uint32_t rows = 0;
  uint32_t missing = 0;                  // pairs not done, of rows that are still wanted
  bool has_unsent = false;               // some pair is neither done nor waiting
  std::vector<uint8_t> abandoned;        // [max_rows]
  std::vector<float> logits;             // [max_rows, n_routed_experts]
  std::vector<ExpertId> experts;         // [max_rows, top_k]
  std::vector<float> weights;            // [max_rows, top_k]
  std::vector<E4m3> codes;               // [max_rows, hidden], e4m3 wire only
  std::vector<float> scales;             // [max_rows, ceil(hidden/128)]
  std::vector<RoundItem> items;          // [max_rows, top_k]
  std::vector<const Bf16*> answer_rows;  // [max_rows, top_k] into `answers`
  std::vector<runtime::Buffer> answers;  // payloads of accepted kCombine frames
  std::vector<Bf16> sum;                 // [max_rows, hidden]
};

}  // namespace moebius::router
