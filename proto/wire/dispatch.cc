#include "proto/wire/dispatch.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/tensor_view.h"

namespace moebius::wire {
namespace {

constexpr uint64_t kSection = 64;
uint64_t Align(uint64_t bytes) { return (bytes + kSection - 1) / kSection * kSection; }

absl::Status Bad(const char* frame, const char* field, uint64_t value, uint64_t limit) {
  return absl::InvalidArgumentError(
      absl::StrCat(frame, " frame: ", field, " ", value, ", allowed 1..", limit));
}

absl::Status CheckCounts(const char* frame, const FrameHeader& header, const RowLimits& limits,
                         uint64_t max_items) {
  if (header.layer >= limits.layers) return Bad(frame, "layer", header.layer, limits.layers - 1);
  if (header.item_count == 0 || header.item_count > max_items) {
    return Bad(frame, "item_count", header.item_count, max_items);
  }
  return absl::OkStatus();
}

bool Aligned(absl::Span<const std::byte> payload) {
  return reinterpret_cast<uintptr_t>(payload.data()) % kSection == 0;
}

void ZeroGap(std::byte* payload, uint64_t begin, uint64_t end) {
  std::memset(payload + begin, 0, end - begin);
}

}  // namespace

DispatchLayout LayoutOfDispatch(const RowLimits& limits, uint64_t rows, uint64_t items) {
  DispatchLayout layout;
  layout.experts_offset = Align(rows * sizeof(DispatchRow));
  layout.rows_offset = Align(layout.experts_offset + items * sizeof(uint32_t));
  const uint64_t hidden = limits.hidden;
  if (limits.e4m3) {
    layout.scales_offset = Align(layout.rows_offset + rows * hidden);
    layout.total_bytes = layout.scales_offset +
                         rows * static_cast<uint64_t>(CeilDiv(limits.hidden, kQuantBlock)) * 4;
  } else {
    layout.total_bytes = layout.rows_offset + rows * hidden * 2;
  }
  return layout;
}

void ZeroDispatchPadding(const RowLimits& limits, uint64_t rows, uint64_t items,
                         std::byte* payload) {
  const DispatchLayout layout = LayoutOfDispatch(limits, rows, items);
  ZeroGap(payload, rows * sizeof(DispatchRow), layout.experts_offset);
  ZeroGap(payload, layout.experts_offset + items * sizeof(uint32_t), layout.rows_offset);
  if (limits.e4m3) {
    ZeroGap(payload, layout.rows_offset + rows * limits.hidden, layout.scales_offset);
  }
}

uint64_t CombineRowsOffset(uint64_t items) { return Align(items * sizeof(CombineItem)); }

uint64_t CombineBytes(const RowLimits& limits, uint64_t items) {
  return CombineRowsOffset(items) + items * uint64_t{limits.hidden} * 2;
}

void ZeroCombinePadding(uint64_t items, std::byte* payload) {
  ZeroGap(payload, items * sizeof(CombineItem), CombineRowsOffset(items));
}

uint32_t EncodedRowBytes(const RowLimits& limits) {
  if (!limits.e4m3) return limits.hidden * 2;
  return limits.hidden + static_cast<uint32_t>(CeilDiv(limits.hidden, kQuantBlock)) * 4;
}

absl::Status DispatchView::Parse(const FrameHeader& header, absl::Span<const std::byte> payload,
                                 const RowLimits& limits, DispatchView* view) {
  if (header.row_count == 0 || header.row_count > limits.max_rows) {
    return Bad("dispatch", "row_count", header.row_count, limits.max_rows);
  }
  const absl::Status counts =
      CheckCounts("dispatch", header, limits, uint64_t{header.row_count} * limits.top_k);
  if (!counts.ok()) return counts;
  if (header.row_bytes != EncodedRowBytes(limits)) {
    return absl::InvalidArgumentError(absl::StrCat("dispatch frame: row_bytes ", header.row_bytes,
                                                   ", expected ", EncodedRowBytes(limits)));
  }
  const DispatchLayout layout = LayoutOfDispatch(limits, header.row_count, header.item_count);
  if (payload.size() != layout.total_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("dispatch frame: payload of ", payload.size(),
                                                   " bytes, expected ", layout.total_bytes));
  }
  if (!Aligned(payload))
    return absl::InvalidArgumentError("dispatch frame: payload is not aligned");
  const auto* rows = reinterpret_cast<const DispatchRow*>(payload.data());
  const auto* experts = reinterpret_cast<const uint32_t*>(payload.data() + layout.experts_offset);
  uint64_t items = 0;
  for (uint32_t i = 0; i < header.row_count; ++i) {
    if (rows[i].row >= limits.max_rows || (i > 0 && rows[i].row <= rows[i - 1].row)) {
      return absl::InvalidArgumentError(absl::StrCat("dispatch frame: rows[", i, "].row ",
                                                     rows[i].row, " is not ascending below ",
                                                     limits.max_rows));
    }
    if (rows[i].item_count == 0 || rows[i].item_count > limits.top_k ||
        items + rows[i].item_count > header.item_count) {
      return absl::InvalidArgumentError(
          absl::StrCat("dispatch frame: rows[", i, "].item_count ", rows[i].item_count));
    }
    for (uint32_t k = 0; k < rows[i].item_count; ++k) {
      const uint32_t expert = experts[items + k];
      if (expert >= limits.experts_per_layer || (k > 0 && expert <= experts[items + k - 1])) {
        return absl::InvalidArgumentError(
            absl::StrCat("dispatch frame: expert ", expert, " at item ", items + k));
      }
    }
    items += rows[i].item_count;
  }
  if (items != header.item_count) {
    return absl::InvalidArgumentError(
        absl::StrCat("dispatch frame: item_count ", header.item_count, ", rows hold ", items));
  }
  view->row_count_ = header.row_count;
  view->item_count_ = header.item_count;
  view->rows_ = rows;
  view->experts_ = experts;
  view->bf16_ = nullptr;
  view->codes_ = nullptr;
  view->scales_ = nullptr;
  const std::byte* data = payload.data() + layout.rows_offset;
  if (limits.e4m3) {
    view->codes_ = reinterpret_cast<const E4m3*>(data);
    view->scales_ = reinterpret_cast<const float*>(payload.data() + layout.scales_offset);
  } else {
    view->bf16_ = reinterpret_cast<const Bf16*>(data);
  }
  return absl::OkStatus();
}

absl::Status CombineView::Parse(const FrameHeader& header, absl::Span<const std::byte> payload,
                                const RowLimits& limits, CombineView* view) {
  const bool with_rows = header.type == static_cast<uint16_t>(FrameType::kCombine);
  const absl::Status counts =
      CheckCounts("combine", header, limits, uint64_t{limits.max_rows} * limits.top_k);
  if (!counts.ok()) return counts;
  const uint64_t expected = with_rows ? CombineBytes(limits, header.item_count)
                                      : uint64_t{header.item_count} * sizeof(CombineItem);
  if (payload.size() != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("combine frame: payload of ", payload.size(), " bytes, expected ", expected));
  }
  if (!Aligned(payload)) return absl::InvalidArgumentError("combine frame: payload is not aligned");
  const auto* items = reinterpret_cast<const CombineItem*>(payload.data());
  for (uint32_t i = 0; i < header.item_count; ++i) {
    if (items[i].row >= limits.max_rows || items[i].expert >= limits.experts_per_layer) {
      return absl::InvalidArgumentError(absl::StrCat("combine frame: items[", i, "] is row ",
                                                     items[i].row, ", expert ", items[i].expert));
    }
  }
  view->item_count_ = header.item_count;
  view->items_ = items;
  view->rows_ =
      with_rows
          ? reinterpret_cast<const Bf16*>(payload.data() + CombineRowsOffset(header.item_count))
          : nullptr;
  return absl::OkStatus();
}

}  // namespace moebius::wire
