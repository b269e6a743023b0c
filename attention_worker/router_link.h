#pragma once

// One layer's rows on their way to the router and back: at most one request outstanding, sent again
// under the next attempt whenever it may have been lost (proto/wire/route.h). Routing is a pure
// function, so an answer to any attempt of the request is the answer.
//
// Owned by the attention actor; loop thread only. Allocates nothing after construction.

#include <cstdint>
#include <optional>

#include "absl/types/span.h"
#include "attention_worker/attention_options.h"
#include "base/float_formats.h"
#include "base/ids.h"
#include "runtime/context.h"

namespace moebius::attention_worker {

class RouterLink {
 public:
  RouterLink(const AttentionOptions& options, int64_t hidden, uint64_t watchdog_tag);

  void Start(runtime::Context& context);
  void Use(const runtime::ActorAddress& router, const std::optional<runtime::PeerInfo>& peer,
           runtime::Context& context);

  // Sends x [rows, hidden] of (step, layer). `x` must stay unchanged until answered() or Reset().
  // REQUIRES: nothing outstanding.
  void Request(StepId step, LayerId layer, const Bf16* x, int32_t rows, runtime::Context& context);

  // Rows [begin, end) are not wanted any more: the router need not wait for their experts. Their
  // answer is unspecified from then on.
  void Abandon(int32_t begin, int32_t end, runtime::Context& context);

  // Returns true when this frame answered the outstanding request.
  bool OnFrame(runtime::FrameReceived& received);
  void OnLink(const runtime::LinkChanged& change, runtime::Context& context);
  void OnWritable(runtime::Context& context);
  void OnWatchdog(runtime::Context& context);

  bool answered() const { return state_ == State::kAnswered; }
  // [rows, hidden], valid from answered() to Reset().
  const Bf16* routed() const { return reinterpret_cast<const Bf16*>(answer_.data()); }
  // Forgets the request and gives its buffers back.
  void Reset();

  uint64_t requests() const { return requests_; }
  uint64_t resends() const { return resends_; }
  uint64_t rejected() const { return rejected_; }

 private:
  enum class State : uint8_t {
    kIdle,
    kUnsent,  // waits for a buffer, credits or the link
    kSent,    // may or may not have arrived
    kAnswered,
  };
  void TrySend(runtime::Context& context);
  void SendAgain(runtime::Context& context);

  runtime::ActorAddress router_;
  std::optional<runtime::PeerInfo> peer_;
  const runtime::Duration timeout_;
  const uint64_t model_digest_;
  const LaneId lane_;
  const int64_t hidden_;
  const int32_t max_rows_;
  const uint64_t watchdog_tag_;

  State state_ = State::kIdle;
  StepId step_;
  LayerId layer_;
  const Bf16* x_ = nullptr;
  int32_t rows_ = 0;
  uint16_t attempt_ = 0;
  uint64_t correlation_ = 0;
  runtime::Buffer answer_;
  // What the watchdog saw when it was last armed: the same again means nothing moved meanwhile.
  bool watchdog_armed_ = false;
  uint64_t watched_correlation_ = 0;
  uint16_t watched_attempt_ = 0;
  bool watched_sent_ = false;

  uint64_t requests_ = 0;
  uint64_t resends_ = 0;
  uint64_t rejected_ = 0;
};

}  // namespace moebius::attention_worker
