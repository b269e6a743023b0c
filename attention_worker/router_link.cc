#include "attention_worker/router_link.h"

#include <cstring>
#include <utility>

#include "base/check.h"
#include "proto/wire/frame.h"
#include "proto/wire/route.h"

namespace moebius::attention_worker {

RouterLink::RouterLink(const AttentionOptions& options, int64_t hidden, uint64_t watchdog_tag)
    : router_(options.router),
      peer_(options.router_peer),
      timeout_(options.route_timeout),
      model_digest_(options.model_digest),
      lane_(options.lane),
      hidden_(hidden),
      max_rows_(options.max_step_tokens),
      watchdog_tag_(watchdog_tag) {}

void RouterLink::Start(runtime::Context& context) {
  if (peer_.has_value()) context.Connect(*peer_);
}

void RouterLink::Use(const runtime::ActorAddress& router,
                     const std::optional<runtime::PeerInfo>& peer, runtime::Context& context) {
  if (peer_.has_value() && (!peer.has_value() || peer->node != peer_->node)) {
    context.Disconnect(peer_->node);
  }
  const bool moved = router != router_;
  router_ = router;
  peer_ = peer;
  if (peer_.has_value()) context.Connect(*peer_);
  if (moved && state_ == State::kSent) SendAgain(context);
  if (state_ == State::kUnsent) TrySend(context);
}

void RouterLink::Request(StepId step, LayerId layer, const Bf16* x, int32_t rows,
                         runtime::Context& context) {
  CHECK(state_ == State::kIdle);
  CHECK_GT(rows, 0);
  step_ = step;
  layer_ = layer;
  x_ = x;
  rows_ = rows;
  attempt_ = 0;
  ++correlation_;
  ++requests_;
  state_ = State::kUnsent;
  TrySend(context);
  if (!watchdog_armed_) {
    watchdog_armed_ = true;
    watched_correlation_ = correlation_;
    watched_attempt_ = attempt_;
    watched_sent_ = state_ == State::kSent;
    context.SetTimer(timeout_, watchdog_tag_);
  }
}

void RouterLink::TrySend(runtime::Context& context) {
  const size_t bytes = static_cast<size_t>(rows_) * hidden_ * sizeof(Bf16);
  std::optional<runtime::Buffer> buffer = context.AcquireBuffer(bytes);
  if (!buffer.has_value()) return;  // Writable follows
  std::memcpy(buffer->data(), x_, bytes);
  runtime::Frame frame;
  frame.header.type = static_cast<uint16_t>(wire::FrameType::kRouteRequest);
  frame.header.model_digest = model_digest_;
  frame.header.lane = lane_.value();
  frame.header.attempt = attempt_;
  frame.header.step = step_.value();
  frame.header.layer = layer_.value();
  frame.header.row_count = static_cast<uint32_t>(rows_);
  frame.header.row_bytes = static_cast<uint32_t>(hidden_ * sizeof(Bf16));
  frame.header.correlation = correlation_;
  frame.payload = *std::move(buffer);
  // Busy: Writable follows. Unreachable: the link's recovery or the watchdog tries again. Either
  // way the buffer goes back now; x_ still has the rows.
  if (context.Send(router_, frame) == runtime::SendResult::kSent) state_ = State::kSent;
}

void RouterLink::SendAgain(runtime::Context& context) {
  ++attempt_;
  ++resends_;
  state_ = State::kUnsent;
  TrySend(context);
}

void RouterLink::Abandon(int32_t begin, int32_t end, runtime::Context& context) {
  if (state_ != State::kSent || begin == end) return;
  const auto count = static_cast<uint32_t>(end - begin);
  std::optional<runtime::Buffer> buffer = context.AcquireBuffer(count * sizeof(uint32_t));
  if (!buffer.has_value()) return;  // a courtesy: without it the router works in vain, that is all
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t row =
        static_cast<uint32_t>(begin) + i;  // little-endian, like every host we run on
    std::memcpy(buffer->data() + i * sizeof(uint32_t), &row, sizeof(uint32_t));
  }
  runtime::Frame frame;
  frame.header.type = static_cast<uint16_t>(wire::FrameType::kRouteAbandon);
  frame.header.model_digest = model_digest_;
  frame.header.lane = lane_.value();
  frame.header.attempt = attempt_;
  frame.header.step = step_.value();
  frame.header.layer = layer_.value();
  frame.header.item_count = count;
  frame.header.correlation = correlation_;
  frame.payload = *std::move(buffer);
  context.Send(router_, frame);
}

bool RouterLink::OnFrame(runtime::FrameReceived& received) {
  const wire::FrameHeader& header = received.frame.header;
  // kUnsent too: the answer to an earlier attempt may overtake the wait to send the next.
  const bool outstanding = state_ == State::kSent || (state_ == State::kUnsent && attempt_ > 0);
  const bool matches = header.type == static_cast<uint16_t>(wire::FrameType::kRouteReply) &&
                       outstanding && header.correlation == correlation_ &&
                       header.step == step_.value() && header.layer == layer_.value() &&
                       header.lane == lane_.value() &&
                       header.row_count == static_cast<uint32_t>(rows_);
  if (!matches ||
      !wire::ValidateRoute(header, received.frame.payload.size(), hidden_, max_rows_).ok()) {
    ++rejected_;
    return false;
  }
  answer_ = std::move(received.frame.payload);
  state_ = State::kAnswered;
  return true;
}

void RouterLink::OnLink(const runtime::LinkChanged& change, runtime::Context& context) {
  if (change.node != router_.node) return;
  switch (change.state) {
    case runtime::LinkState::kDown:
      // What was in flight is unknown; by the contract its answer can no longer arrive.
      if (state_ == State::kSent) SendAgain(context);
      return;
    case runtime::LinkState::kUp:
      if (state_ == State::kUnsent) TrySend(context);
      return;
    case runtime::LinkState::kSlow:
    case runtime::LinkState::kSuspect:
      return;
  }
}

void RouterLink::OnWritable(runtime::Context& context) {
  if (state_ == State::kUnsent) TrySend(context);
}

void RouterLink::OnWatchdog(runtime::Context& context) {
  watchdog_armed_ = false;
  if (state_ != State::kUnsent && state_ != State::kSent) return;
  if (state_ == State::kUnsent) {
    TrySend(context);
  } else if (watched_sent_ && watched_correlation_ == correlation_ &&
             watched_attempt_ == attempt_) {
    SendAgain(context);
  }
  watchdog_armed_ = true;
  watched_correlation_ = correlation_;
  watched_attempt_ = attempt_;
  watched_sent_ = state_ == State::kSent;
  context.SetTimer(timeout_, watchdog_tag_);
}

void RouterLink::Reset() {
  answer_ = runtime::Buffer();
  state_ = State::kIdle;
}

}  // namespace moebius::attention_worker
