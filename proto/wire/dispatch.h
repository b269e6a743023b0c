#pragma once

// Payloads between a router and an expert worker.
//
// kDispatch (router -> expert worker): header {step, layer, lane, attempt, correlation, row_count,
// item_count, row_bytes}. Payload, every section starting at a multiple of 64 bytes:
//   DispatchRow[row_count]      which rows of the router's round, and how many experts each is for
//   uint32 expert[item_count]   of row 0, then of row 1, ...; ascending and distinct within a row
//   rows                        bf16: row_count * hidden * 2 bytes
//                               e4m3: row_count * hidden codes, then (64-aligned) row_count *
//                               ceil(hidden/128) float
// A token's row travels once to each destination, however many of its experts live there.
//
// kCombine (expert worker -> router): the same header fields echoed; payload
// CombineItem[item_count], then (64-aligned) item_count rows of hidden bf16: the expert's output
// for that row, not yet weighted. kNotHosted: the same, without rows: these (row, expert) pairs
// must be asked of somebody else. One kDispatch is answered by one kCombine, one kNotHosted, or one
// of each.
//
// All integers little-endian. Nothing is trusted: the readers check every count against the
// payload's size and the model's limits before anything is used.

#include <cstdint>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/float_formats.h"
#include "proto/wire/frame.h"

namespace moebius::wire {

struct DispatchRow {
  uint32_t row = 0;         // number within the router's round
  uint32_t item_count = 0;  // experts asked for this row, at least 1
};
static_assert(sizeof(DispatchRow) == 8 && std::is_trivially_copyable_v<DispatchRow>);

struct CombineItem {
  uint32_t row = 0;
  uint32_t expert = 0;
};
static_assert(sizeof(CombineItem) == 8 && std::is_trivially_copyable_v<CombineItem>);

// What both sides know from the model's configuration.
struct RowLimits {
  uint32_t hidden = 0;
  uint32_t layers = 0;
  uint32_t experts_per_layer = 0;
  uint32_t top_k = 0;
  uint32_t max_rows = 0;  // rows of a round (their numbers are below it) and of a frame
  bool e4m3 = false;      // rows as e4m3 codes with scales, else bf16
};

// Sizes of the sections of a dispatch payload.
struct DispatchLayout {
  uint64_t experts_offset = 0;
  uint64_t rows_offset = 0;
  uint64_t scales_offset = 0;  // e4m3 only
  uint64_t total_bytes = 0;
};
DispatchLayout LayoutOfDispatch(const RowLimits& limits, uint64_t rows, uint64_t items);

// Zeroes the bytes between the sections of a dispatch payload. Buffers come as their last user left
// them; without this the checksum, and a replay, would depend on it and old bytes would leave the
// process.
void ZeroDispatchPadding(const RowLimits& limits, uint64_t rows, uint64_t items,
                         std::byte* payload);

// Offset of the rows in a combine payload, and its size.
uint64_t CombineRowsOffset(uint64_t items);
uint64_t CombineBytes(const RowLimits& limits, uint64_t items);
void ZeroCombinePadding(uint64_t items, std::byte* payload);

// Bytes of one encoded row (header field row_bytes of kDispatch; for kCombine it is 2 * hidden).
uint32_t EncodedRowBytes(const RowLimits& limits);

// A checked view of a kDispatch payload; borrows it. The payload must be 64-byte aligned (pool
// buffers are).
class DispatchView {
 public:
  // INVALID_ARGUMENT names the field that is wrong.
  static absl::Status Parse(const FrameHeader& header, absl::Span<const std::byte> payload,
                            const RowLimits& limits, DispatchView* view);
  uint32_t row_count() const { return row_count_; }
  uint32_t item_count() const { return item_count_; }
  const DispatchRow* rows() const { return rows_; }
  const uint32_t* experts() const { return experts_; }
  const Bf16* bf16_rows() const { return bf16_; }  // [row_count, hidden], or nullptr
  const E4m3* codes() const { return codes_; }     // [row_count, hidden], or nullptr
  const float* scales() const { return scales_; }  // [row_count, ceil(hidden/128)]

 private:
  uint32_t row_count_ = 0;
  uint32_t item_count_ = 0;
  const DispatchRow* rows_ = nullptr;
  const uint32_t* experts_ = nullptr;
  const Bf16* bf16_ = nullptr;
  const E4m3* codes_ = nullptr;
  const float* scales_ = nullptr;
};

// A checked view of a kCombine or kNotHosted payload; borrows it.
class CombineView {
 public:
  static absl::Status Parse(const FrameHeader& header, absl::Span<const std::byte> payload,
                            const RowLimits& limits, CombineView* view);
  uint32_t item_count() const { return item_count_; }
  const CombineItem* items() const { return items_; }
  const Bf16* rows() const { return rows_; }  // [item_count, hidden]; nullptr for kNotHosted

 private:
  uint32_t item_count_ = 0;
  const CombineItem* items_ = nullptr;
  const Bf16* rows_ = nullptr;
};

}  // namespace moebius::wire
