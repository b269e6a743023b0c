#pragma once

// Configuration and counters of a router.

#include <atomic>
#include <cstdint>
#include <vector>

#include "base/tensor_view.h"
#include "kernels/moe.h"
#include "proto/wire/dispatch.h"
#include "runtime/clock.h"

namespace moebius::router {

// Gate weights of one layer, borrowed; empty for dense layers.
struct GateWeights {
  MatrixView gate;              // [n_routed_experts, hidden], BF16
  const float* bias = nullptr;  // [n_routed_experts] e_score_correction_bias, or nullptr
};

struct RouterOptions {
  wire::RowLimits limits;
  kernels::GateConfig gate;
  bool power_of_two_scales = false;  // of e4m3 rows (kernels::QuantizeRowsParams)
  std::vector<GateWeights> layers;   // [limits.layers]
  // Requests in progress at once: attention workers times lanes.
  uint32_t max_rounds = 8;
  // Rows of one dispatch frame; larger shares go out as several frames.
  uint32_t max_rows_per_frame = 256;
  // A pair unanswered for 3 x the p95 of its destination's recent answers, within these bounds, is
  // also asked of a replica.
  runtime::Duration hedge_min = std::chrono::milliseconds(30);
  runtime::Duration hedge_max = std::chrono::milliseconds(150);
  // After this an unanswered pair is asked again of whoever hosts it, even of the same worker.
  runtime::Duration retry_after = std::chrono::seconds(1);
  runtime::Duration tick = std::chrono::milliseconds(10);
};

struct RouterCounters {
  std::atomic<uint64_t> rounds{0};
  std::atomic<uint64_t> rows{0};
  std::atomic<uint64_t> items_sent{0};     // first attempts
  std::atomic<uint64_t> items_resent{0};   // after a loss, NOT_HOSTED or silence
  std::atomic<uint64_t> items_hedged{0};   // also asked of a replica
  std::atomic<uint64_t> stale_answers{0};  // of no outstanding pair: dropped
  std::atomic<uint64_t> duplicate_answers{0};
  std::atomic<uint64_t> exactness_mismatches{
      0};  // a loser whose bits differ from the winner's: must stay 0
  std::atomic<uint64_t> refused_frames{0};
  std::atomic<uint64_t> rows_without_holder{0};
};

}  // namespace moebius::router
