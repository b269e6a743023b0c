#pragma once

// Payloads between an attention worker and a router (same node or not). The hop carries bf16: the
// gate must not see quantised rows.
//
// kRouteRequest: header {step, layer, lane, row_count = m, row_bytes = 2 * hidden, correlation};
// the
//   payload is m dense rows of bf16, the layer's input after post_attention_layernorm.
// kRouteReply: the same header fields and correlation; payload m dense rows of bf16: the routed sum
// of
//   each row (kernels/moe.h, CombineParams). A row that was abandoned comes back as zeros.
// kRouteAbandon: correlation of the request; item_count row numbers as little-endian uint32,
// strictly
//   ascending: their results are not wanted any more. Others are unaffected. There is no answer of
//   its own.
//
// At most one request per (attention worker, lane) is outstanding; a router keeps no state between
// requests, so after its death the whole request is sent again, to any router, under the next
// `attempt`.

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/wire/frame.h"

namespace moebius::wire {

// Checks a kRouteRequest or kRouteReply against the model's hidden size and the bound on rows of
// one step. INVALID_ARGUMENT names the field.
absl::Status ValidateRoute(const FrameHeader& header, uint64_t payload_bytes, uint64_t hidden,
                           uint64_t max_rows);

// Checks a kRouteAbandon: 4 * item_count bytes, numbers below `max_rows`, strictly ascending.
absl::Status ValidateRouteAbandon(const FrameHeader& header, absl::Span<const std::byte> payload,
                                  uint64_t max_rows);

}  // namespace moebius::wire
