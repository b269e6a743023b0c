#include "router/router_actor.h"

#include <algorithm>
#include <any>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "proto/wire/route.h"

namespace moebius::router {
namespace {

constexpr uint64_t kTickTag = UINT64_MAX;
enum ComputeKind : uint64_t { kGateCompute = 0, kCombineCompute = 1 };

}  // namespace

RouterActor::RouterActor(RouterOptions options, kernels::Backend* backend)
    : options_(std::move(options)),
      backend_(backend),
      top_k_(options_.limits.top_k),
      counters_(std::make_shared<RouterCounters>()),
      rounds_(options_.max_rounds),
      zero_row_(options_.limits.hidden) {
  CHECK_EQ(options_.layers.size(), size_t{options_.limits.layers});
  CHECK_EQ(static_cast<uint32_t>(options_.gate.num_experts_per_tok), top_k_);
  const size_t rows = options_.limits.max_rows;
  const size_t items = rows * top_k_;
  for (Round& round : rounds_) {
    round.abandoned.resize(rows);
    round.logits.resize(rows * static_cast<size_t>(options_.gate.n_routed_experts));
    round.experts.resize(items);
    round.weights.resize(items);
    if (options_.limits.e4m3) {
      round.codes.resize(rows * options_.limits.hidden);
      round.scales.resize(rows * static_cast<size_t>(CeilDiv(options_.limits.hidden, kQuantBlock)));
    }
    round.items.resize(items);
    round.answer_rows.resize(items);
    round.answers.reserve(items);
    round.sum.resize(rows * options_.limits.hidden);
  }
  plan_.reserve(items);
  share_.reserve(items);
}

RouterActor::~RouterActor() = default;

void RouterActor::Receive(runtime::Message message, runtime::Context& context) {
  if (auto* received = std::get_if<runtime::FrameReceived>(&message)) {
    switch (static_cast<wire::FrameType>(received->frame.header.type)) {
      case wire::FrameType::kRouteRequest:
        OnRequest(std::move(*received), context);
        break;
      case wire::FrameType::kRouteAbandon:
        OnAbandon(*received, context);
        break;
      case wire::FrameType::kCombine:
      case wire::FrameType::kNotHosted:
        OnAnswer(std::move(*received), context);
        break;
      default:
        counters_->refused_frames.fetch_add(1, std::memory_order_relaxed);
    }
  } else if (auto* done = std::get_if<runtime::ComputeDone>(&message)) {
    OnComputeDone(*done, context);
  } else if (auto* change = std::get_if<runtime::LinkChanged>(&message)) {
    OnLinkChanged(*change, context);
  } else if (auto* posted = std::get_if<runtime::Posted>(&message)) {
    if (auto* update = std::any_cast<PlacementUpdate>(&posted->body)) OnPlacement(*update, context);
  } else if (std::get_if<runtime::Writable>(&message) != nullptr) {
    for (Round& round : rounds_) {
      if (round.phase == RoundPhase::kWaiting && round.has_unsent) SendUnsent(round, context);
      if (round.phase == RoundPhase::kReplying) Reply(round, context);
    }
  } else if (auto* fired = std::get_if<runtime::TimerFired>(&message)) {
    if (fired->tag == kTickTag) OnTick(context);
  }
}

void RouterActor::OnRequest(runtime::FrameReceived received, runtime::Context& context) {
  const wire::FrameHeader& header = received.frame.header;
  absl::Status status = wire::ValidateRoute(header, received.frame.payload.size(),
                                            options_.limits.hidden, options_.limits.max_rows);
  if (status.ok() &&
      (header.layer >= options_.layers.size() || options_.layers[header.layer].gate.empty())) {
    status = absl::InvalidArgumentError("route frame: layer has no gate here");
  }
  if (!status.ok()) {
    counters_->refused_frames.fetch_add(1, std::memory_order_relaxed);
    LOG_WARNING(status.ToString());
    return;
  }
  // A sender has one request a lane: a new one means that it gave up the old.
  for (Round& round : rounds_) {
    if (round.phase == RoundPhase::kFree || round.phase == RoundPhase::kDoomed ||
        round.from != received.from || round.request.header.lane != header.lane) {
      continue;
    }
    if (round.phase == RoundPhase::kGating || round.phase == RoundPhase::kCombining) {
      round.phase = RoundPhase::kDoomed;  // compute still reads it
    } else {
      Free(round);
    }
  }
  const auto slot = std::find_if(rounds_.begin(), rounds_.end(), [](const Round& round) {
    return round.phase == RoundPhase::kFree;
  });
  if (slot == rounds_.end()) {
    counters_->refused_frames.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  Round& round = *slot;
  round.phase = RoundPhase::kGating;
  round.generation = next_generation_++;
  round.from = received.from;
  round.rows = header.row_count;
  round.request = std::move(received.frame);
  std::fill_n(round.abandoned.begin(), round.rows, uint8_t{0});
  counters_->rounds.fetch_add(1, std::memory_order_relaxed);
  counters_->rows.fetch_add(round.rows, std::memory_order_relaxed);
  const uint64_t tag = (round.generation * rounds_.size() + SlotOf(round)) * 2 + kGateCompute;
  context.Submit([this, &round] { return Gate(round); }, tag);
}

absl::Status RouterActor::Gate(Round& round) {
  const GateWeights& weights = options_.layers[round.request.header.layer];
  const auto* x = reinterpret_cast<const Bf16*>(round.request.payload.data());
  kernels::LinearParams linear;
  linear.m = round.rows;
  linear.weight = weights.gate;
  linear.x = x;
  linear.x_stride = options_.limits.hidden;
  linear.out_f32 = round.logits.data();
  linear.out_stride = options_.gate.n_routed_experts;
  absl::Status status = backend_->Linear(linear);
  if (!status.ok()) return status;
  kernels::GateSelectParams select;
  select.m = round.rows;
  select.config = options_.gate;
  select.logits = round.logits.data();
  select.bias = weights.bias;
  select.experts = round.experts.data();
  select.weights = round.weights.data();
  status = backend_->GateSelect(select);
  if (!status.ok() || !options_.limits.e4m3) return status;
  // Once, by the row's own values: every destination gets the same codes.
  kernels::QuantizeRowsParams quantize;
  quantize.m = round.rows;
  quantize.dim = options_.limits.hidden;
  quantize.x = x;
  quantize.codes = round.codes.data();
  quantize.scales = round.scales.data();
  quantize.power_of_two_scales = options_.power_of_two_scales;
  return backend_->QuantizeRows(quantize);
}

absl::Status RouterActor::Combine(Round& round) {
  kernels::CombineParams combine;
  combine.m = round.rows;
  combine.dim = options_.limits.hidden;
  combine.top_k = static_cast<int32_t>(top_k_);
  combine.experts_per_group = kernels::CombineGroupSize(options_.gate);
  combine.experts = round.experts.data();
  combine.weights = round.weights.data();
  combine.rows = round.answer_rows.data();
  combine.out = round.sum.data();
  return backend_->Combine(combine);
}

void RouterActor::OnComputeDone(const runtime::ComputeDone& done, runtime::Context& context) {
  Round& round = rounds_[(done.tag / 2) % rounds_.size()];
  CHECK_EQ(round.generation, done.tag / 2 / rounds_.size());
  if (!done.status.ok()) LOG_ERROR(done.status.ToString());
  if (round.phase == RoundPhase::kDoomed || !done.status.ok()) {
    Free(round);
    return;
  }
  if (done.tag % 2 == kCombineCompute) {
    CHECK(round.phase == RoundPhase::kCombining);
    for (uint32_t row = 0; row < round.rows; ++row) {
      if (round.abandoned[row]) {
        std::fill_n(round.sum.begin() + static_cast<int64_t>(size_t{row} * options_.limits.hidden),
                    options_.limits.hidden, Bf16{});
      }
    }
    round.phase = RoundPhase::kReplying;
    Reply(round, context);
    return;
  }
  CHECK(round.phase == RoundPhase::kGating);
  round.phase = RoundPhase::kWaiting;
  round.missing = 0;
  for (uint32_t row = 0; row < round.rows; ++row) {
    for (uint32_t slot = 0; slot < top_k_; ++slot) round.items[row * top_k_ + slot] = RoundItem();
    if (!round.abandoned[row]) round.missing += top_k_;
  }
  SendUnsent(round, context);
  EnsureTick(context);
  MaybeCombine(round, context);
}

void RouterActor::SendUnsent(Round& round, runtime::Context& context) {
  // A destination that turns out to be unreachable is down for now, and its share is planned again.
  for (size_t attempt = 0; attempt <= destinations_.size(); ++attempt) {
    plan_.clear();
    for (uint32_t row = 0; row < round.rows; ++row) {
      if (round.abandoned[row]) continue;
      for (uint32_t slot = 0; slot < top_k_; ++slot) {
        const RoundItem& item = round.items[row * top_k_ + slot];
        if (item.done || item.waits) continue;
        PlanItem plan;
        plan.row = row;
        plan.expert = round.experts[row * top_k_ + slot].value();
        plan_.push_back(plan);
      }
    }
    round.has_unsent = !plan_.empty();
    if (plan_.empty()) return;
    PlanDispatch(replicas_, destinations_, exclusions_, round.request.header.layer,
                 absl::MakeSpan(plan_), plan_scratch_);
    bool lost_one = false;
    bool all_sent = true;
    for (uint16_t d = 0; d < destinations_.size(); ++d) {
      share_.clear();
      for (const PlanItem& item : plan_) {
        if (item.destination == d) share_.push_back(item);
      }
      if (share_.empty()) continue;
      if (!SendFrame(round, d, share_, context)) {
        all_sent = false;
        lost_one = lost_one || destinations_[d].state == DestinationState::kDown;
      }
    }
    for (const PlanItem& item : plan_) {
      if (item.destination == kNoDestination) {
        all_sent = false;
        counters_->rows_without_holder.fetch_add(1, std::memory_order_relaxed);
      }
    }
    round.has_unsent = !all_sent;
    if (!lost_one) return;
  }
}

bool RouterActor::SendFrame(Round& round, uint16_t d, absl::Span<const PlanItem> items,
                            runtime::Context& context) {
  const wire::RowLimits& limits = options_.limits;
  const size_t hidden = limits.hidden;
  const size_t scale_count = static_cast<size_t>(CeilDiv(limits.hidden, kQuantBlock));
  size_t begin = 0;
  while (begin < items.size()) {
    size_t end = begin;
    uint32_t rows = 0;
    while (end < items.size()) {
      const bool new_row = end == begin || items[end].row != items[end - 1].row;
      if (new_row && rows == options_.max_rows_per_frame) break;
      rows += new_row ? 1 : 0;
      ++end;
    }
    const uint32_t count = static_cast<uint32_t>(end - begin);
    const wire::DispatchLayout layout = wire::LayoutOfDispatch(limits, rows, count);
    std::optional<runtime::Buffer> buffer = context.AcquireBuffer(layout.total_bytes);
    if (!buffer) return false;
    std::byte* data = buffer->data();
    wire::ZeroDispatchPadding(limits, rows, count, data);
    auto* dispatch_rows = reinterpret_cast<wire::DispatchRow*>(data);
    auto* experts = reinterpret_cast<uint32_t*>(data + layout.experts_offset);
    uint32_t r = 0;
    uint16_t frame_attempt = 0;
    for (size_t i = begin; i < end; ++i) {
      const PlanItem& item = items[i];
      if (i > begin && item.row != items[i - 1].row) ++r;
      if (i == begin || item.row != items[i - 1].row) {
        dispatch_rows[r] = wire::DispatchRow{item.row, 0};
        if (limits.e4m3) {
          std::memcpy(data + layout.rows_offset + r * hidden,
                      round.codes.data() + item.row * hidden, hidden);
          std::memcpy(data + layout.scales_offset + r * scale_count * sizeof(float),
                      round.scales.data() + item.row * scale_count, scale_count * sizeof(float));
        } else {
          std::memcpy(data + layout.rows_offset + r * hidden * sizeof(Bf16),
                      round.request.payload.data() + item.row * hidden * sizeof(Bf16),
                      hidden * sizeof(Bf16));
        }
      }
      ++dispatch_rows[r].item_count;
      experts[i - begin] = item.expert;
      frame_attempt = std::max<uint16_t>(
          frame_attempt, round.items[ItemIndex(round, item.row, item.expert)].attempts);
    }
    runtime::Frame frame;
    const wire::FrameHeader& request = round.request.header;
    frame.header.type = static_cast<uint16_t>(wire::FrameType::kDispatch);
    frame.header.step = request.step;
    frame.header.layer = request.layer;
    frame.header.lane = request.lane;
    frame.header.attempt = frame_attempt;
    frame.header.epoch = placement_ != nullptr ? placement_->epoch().value() : 0;
    frame.header.row_count = rows;
    frame.header.item_count = count;
    frame.header.row_bytes = wire::EncodedRowBytes(limits);
    frame.header.correlation = round.generation * rounds_.size() + SlotOf(round);
    frame.payload = std::move(*buffer);
    const runtime::SendResult sent = context.Send(destinations_[d].address, frame);
    if (sent == runtime::SendResult::kUnreachable) destinations_[d].state = DestinationState::kDown;
    if (sent != runtime::SendResult::kSent) return false;
    const runtime::TimePoint now = context.Now();
    for (size_t i = begin; i < end; ++i) {
      PlanItem item = items[i];
      item.destination = d;
      MarkAsked(round, item, now);
    }
    begin = end;
  }
  return true;
}

void RouterActor::MarkAsked(Round& round, const PlanItem& plan, runtime::TimePoint now) {
  RoundItem& item = round.items[ItemIndex(round, plan.row, plan.expert)];
  if (item.waits) {
    counters_->items_hedged.fetch_add(1, std::memory_order_relaxed);
  } else if (item.attempts > 0) {
    counters_->items_resent.fetch_add(1, std::memory_order_relaxed);
  } else {
    counters_->items_sent.fetch_add(1, std::memory_order_relaxed);
    item.first_asked_at = now;
  }
  item.asked[item.asked[0] == kNoDestination ? 0 : 1] = plan.destination;
  item.asked_at = now;
  item.waits = true;
  if (item.attempts < UINT8_MAX) ++item.attempts;
  ++destinations_[plan.destination].outstanding_items;
}

void RouterActor::ForgetAsked(RoundItem& item, uint16_t destination) {
  for (uint16_t& asked : item.asked) {
    if (asked != destination) continue;
    asked = kNoDestination;
    if (!item.done) --destinations_[destination].outstanding_items;
  }
  if (item.asked[0] == kNoDestination) std::swap(item.asked[0], item.asked[1]);
  if (item.asked[0] == kNoDestination) item.waits = false;
}

size_t RouterActor::ItemIndex(const Round& round, uint32_t row, uint32_t expert) const {
  for (uint32_t slot = 0; slot < top_k_; ++slot) {
    if (round.experts[row * top_k_ + slot].value() == expert) return row * top_k_ + slot;
  }
  return SIZE_MAX;
}

uint16_t RouterActor::FindDestination(const runtime::ActorAddress& address) const {
  for (uint16_t d = 0; d < destinations_.size(); ++d) {
    if (destinations_[d].address == address) return d;
  }
  return kNoDestination;
}

void RouterActor::OnAnswer(runtime::FrameReceived received, runtime::Context& context) {
  const wire::FrameHeader& header = received.frame.header;
  wire::CombineView view;
  const absl::Status status =
      wire::CombineView::Parse(header, received.frame.payload.bytes(), options_.limits, &view);
  if (!status.ok()) {
    counters_->refused_frames.fetch_add(1, std::memory_order_relaxed);
    LOG_WARNING(status.ToString());
    return;
  }
  const uint16_t d = FindDestination(received.from);
  Round& round = rounds_[header.correlation % rounds_.size()];
  const wire::FrameHeader& request = round.request.header;
  const bool holds_answers = round.phase == RoundPhase::kWaiting ||
                             round.phase == RoundPhase::kCombining ||
                             round.phase == RoundPhase::kReplying;
  if (d == kNoDestination || !holds_answers ||
      round.generation != header.correlation / rounds_.size() || header.step != request.step ||
      header.layer != request.layer || header.lane != request.lane) {
    counters_->stale_answers.fetch_add(view.item_count(), std::memory_order_relaxed);
    return;
  }
  const bool not_hosted = view.rows() == nullptr;
  bool accepted = false;
  int64_t slowest = 0;
  for (uint32_t i = 0; i < view.item_count(); ++i) {
    const wire::CombineItem& answer = view.items()[i];
    const size_t index =
        answer.row < round.rows ? ItemIndex(round, answer.row, answer.expert) : SIZE_MAX;
    if (index == SIZE_MAX ||
        (round.items[index].asked[0] != d && round.items[index].asked[1] != d)) {
      counters_->stale_answers.fetch_add(1, std::memory_order_relaxed);
      continue;
    }
    RoundItem& item = round.items[index];
    if (not_hosted) {
      if (item.done) continue;
      exclusions_.push_back(Exclusion{d, header.layer, answer.expert});
      ForgetAsked(item, d);
      round.has_unsent = round.has_unsent || !item.waits;
      continue;
    }
    const Bf16* row = view.rows() + size_t{i} * options_.limits.hidden;
    if (item.done) {
      // The loser of a hedge: experts are pure, so its bits must be the winner's.
      counters_->duplicate_answers.fetch_add(1, std::memory_order_relaxed);
      if (std::memcmp(row, round.answer_rows[index],
                      size_t{options_.limits.hidden} * sizeof(Bf16)) != 0) {
        counters_->exactness_mismatches.fetch_add(1, std::memory_order_relaxed);
        LOG_ERROR("two answers for one row and expert differ in their bits");
      }
      continue;
    }
    if (round.phase != RoundPhase::kWaiting) continue;  // of an abandoned row
    slowest = std::max(slowest, (context.Now() - item.asked_at).count());
    for (uint16_t asked : item.asked) {
      if (asked != kNoDestination) --destinations_[asked].outstanding_items;
    }
    item.done = true;
    item.waits = false;
    round.answer_rows[index] = row;
    if (!round.abandoned[answer.row]) --round.missing;
    accepted = true;
  }
  if (accepted) {
    AnswerTimes& times = answer_times_[d];
    times.ns[times.count++ % times.ns.size()] = slowest;
    round.answers.push_back(std::move(received.frame.payload));  // the rows stay where they are
  }
  if (round.phase != RoundPhase::kWaiting) return;
  if (round.has_unsent) SendUnsent(round, context);
  MaybeCombine(round, context);
}

void RouterActor::MaybeCombine(Round& round, runtime::Context& context) {
  if (round.phase != RoundPhase::kWaiting || round.missing > 0) return;
  for (uint32_t row = 0; row < round.rows; ++row) {
    if (!round.abandoned[row]) continue;
    for (uint32_t slot = 0; slot < top_k_; ++slot) {
      const size_t index = row * top_k_ + slot;
      if (!round.items[index].done) round.answer_rows[index] = zero_row_.data();
    }
  }
  round.phase = RoundPhase::kCombining;
  const uint64_t tag = (round.generation * rounds_.size() + SlotOf(round)) * 2 + kCombineCompute;
  context.Submit([this, &round] { return Combine(round); }, tag);
}

void RouterActor::Reply(Round& round, runtime::Context& context) {
  const size_t bytes = size_t{round.rows} * options_.limits.hidden * sizeof(Bf16);
  // The request's own buffer has the size of the answer and is not needed any more.
  runtime::Frame frame;
  frame.header = round.request.header;
  frame.header.type = static_cast<uint16_t>(wire::FrameType::kRouteReply);
  frame.payload = std::move(round.request.payload);
  std::memcpy(frame.payload.data(), round.sum.data(), bytes);
  const runtime::SendResult sent = context.Send(round.from, frame);
  if (sent == runtime::SendResult::kBusy) {
    round.request.payload = std::move(frame.payload);
    return;
  }
  Free(round);  // sent, or nobody wants it any more
}

void RouterActor::Free(Round& round) {
  if (round.phase != RoundPhase::kGating) {
    for (size_t i = 0; i < size_t{round.rows} * top_k_; ++i) {
      RoundItem& item = round.items[i];
      for (uint16_t& asked : item.asked) {
        if (asked != kNoDestination && !item.done) --destinations_[asked].outstanding_items;
        asked = kNoDestination;
      }
      item = RoundItem();
    }
  }
  round.answers.clear();
  round.request = runtime::Frame();
  round.rows = 0;
  round.has_unsent = false;
  round.phase = RoundPhase::kFree;
}

void RouterActor::OnAbandon(const runtime::FrameReceived& received, runtime::Context& context) {
  const wire::FrameHeader& header = received.frame.header;
  const absl::Status status =
      wire::ValidateRouteAbandon(header, received.frame.payload.bytes(), options_.limits.max_rows);
  if (!status.ok()) {
    counters_->refused_frames.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  for (Round& round : rounds_) {
    if ((round.phase != RoundPhase::kGating && round.phase != RoundPhase::kWaiting) ||
        round.from != received.from || round.request.header.correlation != header.correlation) {
      continue;
    }
    for (uint32_t i = 0; i < header.item_count; ++i) {
      uint32_t row;
      std::memcpy(&row, received.frame.payload.data() + i * sizeof(row), sizeof(row));
      if (row >= round.rows || round.abandoned[row]) continue;
      round.abandoned[row] = 1;
      if (round.phase != RoundPhase::kWaiting) continue;
      for (uint32_t slot = 0; slot < top_k_; ++slot) {
        if (!round.items[row * top_k_ + slot].done) --round.missing;
      }
    }
    MaybeCombine(round, context);
  }
}

void RouterActor::LoseDestination(uint16_t d, runtime::Context& context) {
  for (Round& round : rounds_) {
    if (round.phase != RoundPhase::kWaiting) continue;
    for (size_t i = 0; i < size_t{round.rows} * top_k_; ++i) {
      RoundItem& item = round.items[i];
      if (item.done || (item.asked[0] != d && item.asked[1] != d)) continue;
      ForgetAsked(item, d);
      round.has_unsent = round.has_unsent || !item.waits;
    }
    if (round.has_unsent) SendUnsent(round, context);
  }
}

void RouterActor::OnLinkChanged(const runtime::LinkChanged& change, runtime::Context& context) {
  DestinationState state = DestinationState::kUp;
  if (change.state == runtime::LinkState::kDown) state = DestinationState::kDown;
  if (change.state == runtime::LinkState::kSlow || change.state == runtime::LinkState::kSuspect) {
    state = DestinationState::kSlow;
  }
  const auto link = std::find_if(links_.begin(), links_.end(),
                                 [&](const auto& entry) { return entry.first == change.node; });
  if (link != links_.end()) link->second = state;
  for (uint16_t d = 0; d < destinations_.size(); ++d) {
    if (destinations_[d].address.node != change.node) continue;
    destinations_[d].state = state;
    if (state == DestinationState::kDown) {
      answer_times_[d] = AnswerTimes();
      // A restarted worker may host other experts than the one that refused.
      std::erase_if(exclusions_, [d](const Exclusion& e) { return e.destination == d; });
      LoseDestination(d, context);
    }
  }
  for (Round& round : rounds_) {
    if (round.phase == RoundPhase::kWaiting && round.has_unsent) SendUnsent(round, context);
  }
}

void RouterActor::OnPlacement(const PlacementUpdate& update, runtime::Context& context) {
  if (update.placement == nullptr ||
      (placement_ != nullptr && update.placement->epoch() <= placement_->epoch())) {
    return;
  }
  CHECK_EQ(update.placement->experts_per_layer(), options_.limits.experts_per_layer);
  const std::vector<Destination> before = destinations_;
  const std::vector<AnswerTimes> times_before = answer_times_;
  placement_ = update.placement;
  replicas_.Build(*placement_, destinations_);
  plan_scratch_.load.reserve(destinations_.size());
  plan_scratch_.reads.reserve(destinations_.size() * replicas_.experts());
  exclusions_.clear();
  answer_times_.assign(destinations_.size(), AnswerTimes());

  const NodeId self = context.Self().node;
  const absl::Span<const runtime::PeerInfo> peers = placement_->Peers();
  for (size_t i = links_.size(); i-- > 0;) {
    const NodeId node = links_[i].first;
    if (std::any_of(peers.begin(), peers.end(),
                    [&](const auto& peer) { return peer.node == node; }))
      continue;
    context.Disconnect(node);
    links_.erase(links_.begin() + static_cast<int64_t>(i));
  }
  for (const runtime::PeerInfo& peer : peers) {
    if (peer.node == self) continue;
    if (std::none_of(links_.begin(), links_.end(),
                     [&](const auto& link) { return link.first == peer.node; })) {
      links_.emplace_back(peer.node, DestinationState::kDown);
    }
    context.Connect(peer);
  }
  for (Destination& destination : destinations_) {
    if (destination.address.node == self) destination.state = DestinationState::kUp;
    for (const auto& [node, state] : links_) {
      if (node == destination.address.node) destination.state = state;
    }
  }
  // What is under way keeps its meaning: numbers of the old table become numbers of the new one.
  std::vector<uint16_t> moved(before.size(), kNoDestination);
  for (uint16_t d = 0; d < before.size(); ++d) {
    moved[d] = FindDestination(before[d].address);
    if (moved[d] != kNoDestination) answer_times_[moved[d]] = times_before[d];
  }
  for (Round& round : rounds_) {
    if (round.phase == RoundPhase::kFree || round.phase == RoundPhase::kGating) continue;
    for (size_t i = 0; i < size_t{round.rows} * top_k_; ++i) {
      RoundItem& item = round.items[i];
      for (uint16_t& asked : item.asked) {
        if (asked == kNoDestination) continue;
        asked = moved[asked];
        if (asked != kNoDestination && !item.done) ++destinations_[asked].outstanding_items;
      }
      if (item.asked[0] == kNoDestination) std::swap(item.asked[0], item.asked[1]);
      if (!item.done && item.waits && item.asked[0] == kNoDestination) {
        item.waits = false;
        round.has_unsent = true;
      }
    }
    if (round.phase == RoundPhase::kWaiting && round.has_unsent) SendUnsent(round, context);
  }
}

runtime::Duration RouterActor::HedgeAfter(uint16_t d) const {
  if (destinations_[d].state == DestinationState::kSlow) return runtime::Duration::zero();
  const AnswerTimes& times = answer_times_[d];
  const size_t count = std::min<size_t>(times.count, times.ns.size());
  if (count < 8) return options_.hedge_max;  // too few to know what is normal here
  std::array<int64_t, 32> sorted = times.ns;
  std::sort(sorted.begin(), sorted.begin() + static_cast<int64_t>(count));
  const runtime::Duration p95(sorted[count * 95 / 100]);
  return std::clamp(3 * p95, options_.hedge_min, options_.hedge_max);
}

void RouterActor::OnTick(runtime::Context& context) {
  ticking_ = false;
  const runtime::TimePoint now = context.Now();
  bool active = false;
  for (Round& round : rounds_) {
    if (round.phase == RoundPhase::kReplying) Reply(round, context);
    if (round.phase == RoundPhase::kFree) continue;
    active = true;
    if (round.phase != RoundPhase::kWaiting) continue;
    plan_.clear();
    for (uint32_t row = 0; row < round.rows; ++row) {
      if (round.abandoned[row]) continue;
      for (uint32_t slot = 0; slot < top_k_; ++slot) {
        RoundItem& item = round.items[row * top_k_ + slot];
        if (item.done || !item.waits) continue;
        if (now - item.asked_at >= options_.retry_after) {
          // The link looks well and yet nothing came: the frame is lost for good. Ask afresh.
          for (uint16_t asked : {item.asked[0], item.asked[1]}) {
            if (asked != kNoDestination) ForgetAsked(item, asked);
          }
          round.has_unsent = true;
        } else if (item.asked[1] == kNoDestination &&
                   now - item.asked_at >= HedgeAfter(item.asked[0])) {
          PlanItem plan;
          plan.row = row;
          plan.expert = round.experts[row * top_k_ + slot].value();
          plan.avoid[0] = item.asked[0];
          plan_.push_back(plan);
        }
      }
    }
    if (!plan_.empty()) {
      PlanDispatch(replicas_, destinations_, exclusions_, round.request.header.layer,
                   absl::MakeSpan(plan_), plan_scratch_);
      for (uint16_t d = 0; d < destinations_.size(); ++d) {
        share_.clear();
        for (const PlanItem& item : plan_) {
          if (item.destination == d) share_.push_back(item);
        }
        if (!share_.empty())
          (void)SendFrame(round, d, share_, context);  // refused: the next tick tries again
      }
    }
    if (round.has_unsent) SendUnsent(round, context);
  }
  if (active) EnsureTick(context);
}

void RouterActor::EnsureTick(runtime::Context& context) {
  if (ticking_) return;
  ticking_ = true;
  context.SetTimer(options_.tick, kTickTag);
}

}  // namespace moebius::router
