#include "proto/wire/route.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace moebius::wire {

absl::Status ValidateRoute(const FrameHeader& header, uint64_t payload_bytes, uint64_t hidden,
                           uint64_t max_rows) {
  if (header.row_count == 0 || header.row_count > max_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("route frame: row_count ", header.row_count, ", allowed 1..", max_rows));
  }
  if (header.row_bytes != 2 * hidden) {
    return absl::InvalidArgumentError(
        absl::StrCat("route frame: row_bytes ", header.row_bytes, ", expected ", 2 * hidden));
  }
  if (payload_bytes != uint64_t{header.row_count} * header.row_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("route frame: payload of ", payload_bytes,
                                                   " bytes, expected row_count * row_bytes"));
  }
  return absl::OkStatus();
}

absl::Status ValidateRouteAbandon(const FrameHeader& header, absl::Span<const std::byte> payload,
                                  uint64_t max_rows) {
  if (header.item_count == 0 || header.item_count > max_rows ||
      payload.size() != uint64_t{header.item_count} * sizeof(uint32_t)) {
    return absl::InvalidArgumentError(absl::StrCat("abandon frame: item_count ", header.item_count,
                                                   " with ", payload.size(), " payload bytes"));
  }
  int64_t previous = -1;
  for (uint32_t i = 0; i < header.item_count; ++i) {
    uint32_t row;
    std::memcpy(&row, payload.data() + i * sizeof(row), sizeof(row));
    if (static_cast<int64_t>(row) <= previous || row >= max_rows) {
      return absl::InvalidArgumentError(absl::StrCat("abandon frame: row ", row, " at item ", i));
    }
    previous = row;
  }
  return absl::OkStatus();
}

}  // namespace moebius::wire
