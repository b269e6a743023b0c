#include "expert_worker/expert_actor.h"

#include <algorithm>
#include <any>
#include <cstring>

#include "base/check.h"
#include "base/log.h"

namespace moebius::expert_worker {
namespace {
constexpr uint64_t kBatchTag = 1;
constexpr uint32_t kNotHere = UINT32_MAX;
}  // namespace

ExpertActor::ExpertActor(ExpertOptions options, kernels::Backend* backend)
    : options_(std::move(options)),
      backend_(backend),
      counters_(std::make_shared<ExpertCounters>()),
      hosted_(size_t{options_.limits.layers} * options_.limits.experts_per_layer) {
  const size_t items = options_.max_batch_items;
  const size_t hidden = options_.limits.hidden;
  CHECK_GE(items, size_t{options_.limits.max_rows} * options_.limits.top_k);  // any one frame fits
  queue_.reserve(options_.max_queued_frames);
  batch_.reserve(options_.max_queued_frames);
  views_.reserve(options_.max_queued_frames);
  item_base_.reserve(options_.max_queued_frames);
  outgoing_.reserve(2 * size_t{options_.max_queued_frames});
  items_.reserve(items);
  item_row_.reserve(items);
  groups_.reserve(std::min(items, hosted_.size()));
  row_index_.reserve(items);
  // Rows are never more than items: each carries at least one.
  if (options_.limits.e4m3) {
    codes_.resize(items * hidden);
    scales_.resize(items * static_cast<size_t>(CeilDiv(options_.limits.hidden, kQuantBlock)));
  } else {
    rows_.resize(items * hidden);
  }
  out_.resize(items * hidden);
}

ExpertActor::~ExpertActor() = default;

void ExpertActor::Receive(runtime::Message message, runtime::Context& context) {
  if (auto* received = std::get_if<runtime::FrameReceived>(&message)) {
    OnDispatch(std::move(*received));
  } else if (auto* done = std::get_if<runtime::ComputeDone>(&message)) {
    CHECK(computing_);
    computing_ = false;
    if (!done->status.ok()) FailBackend(done->status);
    answering_ = true;
    answered_ = 0;
  } else if (auto* posted = std::get_if<runtime::Posted>(&message)) {
    if (auto* host = std::any_cast<HostExperts>(&posted->body)) {
      hosting_.push_back(std::move(*host));
    } else if (auto* drop = std::any_cast<DropExperts>(&posted->body)) {
      dropping_.push_back(std::move(*drop));
    } else if (auto* drain = std::any_cast<Drain>(&posted->body)) {
      drains_.push_back(std::move(drain->on_drained));
    }
  }
  // Whatever happened: leave what can leave, then start what can start.
  Flush(context);
  if (answering_) Answer(context);
  if (!computing_ && !answering_) {
    ApplyHosting();
    StartBatch(context);
  }
  CheckDrained();
}

void ExpertActor::OnDispatch(runtime::FrameReceived received) {
  wire::DispatchView view;
  const bool dispatch =
      received.frame.header.type == static_cast<uint16_t>(wire::FrameType::kDispatch);
  const absl::Status status =
      dispatch ? wire::DispatchView::Parse(received.frame.header, received.frame.payload.bytes(),
                                           options_.limits, &view)
               : absl::InvalidArgumentError("not a dispatch frame");
  if (!status.ok() || queue_.size() - queue_head_ >= options_.max_queued_frames) {
    counters_->refused_frames.fetch_add(1, std::memory_order_relaxed);
    if (!status.ok()) LOG_WARNING(status.ToString());
    return;
  }
  counters_->rows_received.fetch_add(view.row_count(), std::memory_order_relaxed);
  if (queue_head_ > 0 && queue_.size() == queue_.capacity()) {
    queue_.erase(queue_.begin(), queue_.begin() + static_cast<int64_t>(queue_head_));
    queue_head_ = 0;
  }
  queue_.push_back(Queued{received.from, std::move(received.frame)});
}

void ExpertActor::FailBackend(const absl::Status& status) {
  // It must not be used again. The batch is refused as not hosted, and so is all that follows: the
  // router asks elsewhere at once, in place of waiting for a row that will not come.
  failed_ = true;
  for (Hosted& hosted : hosted_) hosted = Hosted();
  counters_->experts_hosted.store(0, std::memory_order_relaxed);
  std::fill(item_row_.begin(), item_row_.end(), kNotHere);
  if (options_.on_backend_failure) options_.on_backend_failure(status);
}

void ExpertActor::ApplyHosting() {
  if (failed_) hosting_.clear();
  for (HostExperts& order : hosting_) {
    for (const HostedExpert& expert : order.experts) {
      CHECK(expert.layer.value() < options_.limits.layers &&
            expert.expert.value() < options_.limits.experts_per_layer);
      Hosted& hosted = hosted_[HostedIndex(expert.layer.value(), expert.expert.value())];
      if (!hosted.present) counters_->experts_hosted.fetch_add(1, std::memory_order_relaxed);
      hosted = Hosted{expert.weights, order.owner, true};
    }
  }
  hosting_.clear();
  for (const DropExperts& order : dropping_) {
    for (const auto& [layer, expert] : order.experts) {
      Hosted& hosted = hosted_[HostedIndex(layer.value(), expert.value())];
      if (hosted.present) counters_->experts_hosted.fetch_sub(1, std::memory_order_relaxed);
      hosted = Hosted();
    }
  }
  dropping_.clear();
}

void ExpertActor::StartBatch(runtime::Context& context) {
  if (queue_head_ == queue_.size()) return;
  batch_.clear();
  uint32_t items = 0;
  while (queue_head_ < queue_.size()) {
    Queued& next = queue_[queue_head_];
    if (items + next.frame.header.item_count > options_.max_batch_items) break;
    items += next.frame.header.item_count;
    batch_.push_back(std::move(next));
    ++queue_head_;
  }
  if (queue_head_ == queue_.size()) {
    queue_.clear();
    queue_head_ = 0;
  }
  PlanBatch();
  if (items_.empty()) {  // nothing of it is ours: only refusals to send
    answering_ = true;
    answered_ = 0;
    Answer(context);
    return;
  }
  computing_ = true;
  counters_->batches.fetch_add(1, std::memory_order_relaxed);
  context.Submit([this] { return Compute(); }, kBatchTag);
}

void ExpertActor::PlanBatch() {
  views_.clear();
  items_.clear();
  item_row_.clear();
  item_base_.clear();
  groups_.clear();
  row_index_.clear();
  gathered_rows_ = 0;
  for (uint32_t f = 0; f < batch_.size(); ++f) {
    wire::DispatchView view;
    const wire::FrameHeader& header = batch_[f].frame.header;
    CHECK(wire::DispatchView::Parse(header, batch_[f].frame.payload.bytes(), options_.limits, &view)
              .ok());
    item_base_.push_back(static_cast<uint32_t>(item_row_.size()));
    uint32_t position = 0;
    for (uint32_t r = 0; r < view.row_count(); ++r) {
      const uint32_t source = static_cast<uint32_t>(gathered_rows_ + r);
      for (uint32_t k = 0; k < view.rows()[r].item_count; ++k, ++position) {
        const uint32_t hosted = HostedIndex(header.layer, view.experts()[position]);
        item_row_.push_back(kNotHere);
        if (hosted_[hosted].present) items_.push_back(BatchItem{hosted, f, position, source});
      }
    }
    gathered_rows_ += view.row_count();
    views_.push_back(view);
  }
  // Group by expert. The order within a group does not reach the bits (row rule).
  std::sort(items_.begin(), items_.end(), [](const BatchItem& a, const BatchItem& b) {
    return a.hosted != b.hosted ? a.hosted < b.hosted
           : a.frame != b.frame ? a.frame < b.frame
                                : a.position < b.position;
  });
  for (uint32_t i = 0; i < items_.size(); ++i) {
    const BatchItem& item = items_[i];
    if (groups_.empty() || items_[i - 1].hosted != item.hosted) {
      groups_.push_back(kernels::ExpertGroup{i, i, hosted_[item.hosted].weights});
    }
    groups_.back().end = i + 1;
    row_index_.push_back(static_cast<int32_t>(item.source));
    item_row_[item_base_[item.frame] + item.position] = i;
  }
}

absl::Status ExpertActor::Compute() {
  const size_t hidden = options_.limits.hidden;
  const size_t scale_count = static_cast<size_t>(CeilDiv(options_.limits.hidden, kQuantBlock));
  size_t at = 0;
  for (const wire::DispatchView& view : views_) {
    const size_t rows = view.row_count();
    if (options_.limits.e4m3) {
      std::memcpy(codes_.data() + at * hidden, view.codes(), rows * hidden);
      std::memcpy(scales_.data() + at * scale_count, view.scales(),
                  rows * scale_count * sizeof(float));
    } else {
      std::memcpy(rows_.data() + at * hidden, view.bf16_rows(), rows * hidden * sizeof(Bf16));
    }
    at += rows;
  }
  kernels::ExpertFfnParams params;
  params.hidden = options_.limits.hidden;
  params.intermediate = options_.intermediate;
  params.groups = groups_.data();
  params.num_groups = static_cast<int64_t>(groups_.size());
  params.m = static_cast<int64_t>(items_.size());
  if (options_.limits.e4m3) {
    params.x_codes = codes_.data();
    params.x_scales = scales_.data();
  } else {
    params.x_bf16 = rows_.data();
  }
  params.row_index = row_index_.data();
  params.out = out_.data();
  params.power_of_two_scales = options_.power_of_two_scales;
  return backend_->ExpertFfn(params);
}

void ExpertActor::Answer(runtime::Context& context) {
  if (!BuildAnswers(context)) return;  // buffers ran out: a Writable brings us back
  batch_.clear();
  answering_ = false;
  Flush(context);
}

bool ExpertActor::BuildAnswers(runtime::Context& context) {
  const wire::RowLimits& limits = options_.limits;
  for (; answered_ < batch_.size(); ++answered_) {
    Queued& asked = batch_[answered_];
    const wire::DispatchView& view = views_[answered_];
    const uint32_t base = item_base_[answered_];
    uint32_t here = 0;
    for (uint32_t i = 0; i < view.item_count(); ++i)
      here += item_row_[base + i] != kNotHere ? 1 : 0;
    const uint32_t absent = view.item_count() - here;
    // Both answers or none, so that a retry after a missing buffer sends nothing twice.
    std::optional<runtime::Buffer> with_rows;
    std::optional<runtime::Buffer> without;
    if (here > 0) {
      with_rows = context.AcquireBuffer(wire::CombineBytes(limits, here));
      if (!with_rows) return false;
      wire::ZeroCombinePadding(here, with_rows->data());
    }
    if (absent > 0) {
      without = context.AcquireBuffer(absent * sizeof(wire::CombineItem));
      if (!without) return false;
    }
    auto* items = with_rows ? reinterpret_cast<wire::CombineItem*>(with_rows->data()) : nullptr;
    auto* refused = without ? reinterpret_cast<wire::CombineItem*>(without->data()) : nullptr;
    std::byte* rows = with_rows ? with_rows->data() + wire::CombineRowsOffset(here) : nullptr;
    const size_t row_bytes = size_t{limits.hidden} * sizeof(Bf16);
    uint32_t position = 0;
    uint32_t done = 0;
    uint32_t done_absent = 0;
    for (uint32_t r = 0; r < view.row_count(); ++r) {
      for (uint32_t k = 0; k < view.rows()[r].item_count; ++k, ++position) {
        const wire::CombineItem item{view.rows()[r].row, view.experts()[position]};
        const uint32_t packed = item_row_[base + position];
        if (packed == kNotHere) {
          refused[done_absent++] = item;
          continue;
        }
        items[done] = item;
        std::memcpy(rows + done * row_bytes, out_.data() + size_t{packed} * limits.hidden,
                    row_bytes);
        ++done;
      }
    }
    const auto enqueue = [&](wire::FrameType type, runtime::Buffer payload, uint32_t count) {
      runtime::Frame frame;
      frame.header = asked.frame.header;
      frame.header.type = static_cast<uint16_t>(type);
      frame.header.row_count = 0;
      frame.header.item_count = count;
      frame.header.row_bytes = limits.hidden * 2;
      frame.payload = std::move(payload);
      outgoing_.push_back(Outgoing{asked.from, std::move(frame)});
    };
    if (with_rows) enqueue(wire::FrameType::kCombine, std::move(*with_rows), here);
    if (without) enqueue(wire::FrameType::kNotHosted, std::move(*without), absent);
    counters_->items_served.fetch_add(here, std::memory_order_relaxed);
    counters_->not_hosted.fetch_add(absent, std::memory_order_relaxed);
    asked.frame = runtime::Frame();
  }
  return true;
}

void ExpertActor::Flush(runtime::Context& context) {
  size_t kept = 0;
  for (size_t i = 0; i < outgoing_.size(); ++i) {
    // Frames to one peer keep their order: behind a refused one, the same peer refuses too.
    if (context.Send(outgoing_[i].to, outgoing_[i].frame) != runtime::SendResult::kBusy) continue;
    if (kept != i) outgoing_[kept] = std::move(outgoing_[i]);
    ++kept;
  }
  outgoing_.resize(kept);
}

void ExpertActor::CheckDrained() {
  if (drains_.empty() || computing_ || answering_ || !outgoing_.empty() ||
      queue_head_ < queue_.size()) {
    return;
  }
  for (const auto& on_drained : drains_) on_drained();
  drains_.clear();
}

}  // namespace moebius::expert_worker
