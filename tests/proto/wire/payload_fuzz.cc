// Feeds arbitrary headers and payloads to every payload parser of the data plane, and reads all
// that a parser accepted: nothing may be read outside the payload.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "base/check.h"
#include "base/tensor_view.h"
#include "proto/wire/dispatch.h"
#include "proto/wire/route.h"
#include "proto/wire/session.h"

namespace {

using namespace moebius::wire;

uint64_t Sum(const void* data, size_t bytes) {
  uint64_t sum = 0;
  for (size_t i = 0; i < bytes; ++i) sum += static_cast<const uint8_t*>(data)[i];
  return sum;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // The counts come first, in few bytes, so that mutations find sensible combinations.
  if (size < 8) return 0;
  RowLimits limits;
  limits.hidden = 16 + data[0] % 3 * 120;
  limits.layers = 4;
  limits.experts_per_layer = 8;
  limits.top_k = 2;
  limits.max_rows = 16;
  limits.e4m3 = data[1] % 2 != 0;
  FrameHeader header;
  header.type =
      static_cast<uint16_t>(data[2] % 2 != 0 ? FrameType::kCombine : FrameType::kNotHosted);
  header.row_count = data[3] % 20;
  header.item_count = data[4] % 40;
  header.layer = data[5] % 5;
  header.row_bytes = data[6] % 2 != 0 ? EncodedRowBytes(limits) : 2 * limits.hidden;
  size_t bytes = size - 8;
  if (data[7] % 2 != 0)
    bytes = LayoutOfDispatch(limits, header.row_count, header.item_count).total_bytes;
  if (data[7] % 4 == 2) bytes = CombineBytes(limits, header.item_count);
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<std::byte[], Free> payload(
      static_cast<std::byte*>(::operator new[](std::max<size_t>(bytes, 1), std::align_val_t(64))));
  std::memset(payload.get(), 0, bytes);
  std::memcpy(payload.get(), data + 8, std::min(bytes, size - 8));
  const absl::Span<const std::byte> span(payload.get(), bytes);
  uint64_t sink = 0;
  DispatchView dispatch;
  if (DispatchView::Parse(header, span, limits, &dispatch).ok()) {
    sink += Sum(dispatch.rows(), dispatch.row_count() * sizeof(DispatchRow));
    sink += Sum(dispatch.experts(), dispatch.item_count() * sizeof(uint32_t));
    if (limits.e4m3) {
      sink += Sum(dispatch.codes(), size_t{dispatch.row_count()} * limits.hidden);
      sink += Sum(dispatch.scales(), dispatch.row_count() * 4 *
                                         static_cast<size_t>(moebius::CeilDiv(limits.hidden, 128)));
    } else {
      sink += Sum(dispatch.bf16_rows(), size_t{dispatch.row_count()} * limits.hidden * 2);
    }
  }
  CombineView combine;
  if (CombineView::Parse(header, span, limits, &combine).ok()) {
    sink += Sum(combine.items(), combine.item_count() * sizeof(CombineItem));
    if (combine.rows() != nullptr)
      sink += Sum(combine.rows(), size_t{combine.item_count()} * limits.hidden * 2);
  }
  (void)ValidateRoute(header, bytes, limits.hidden, limits.max_rows);
  (void)ValidateRouteAbandon(header, span, limits.max_rows);
  HelloRecord hello;
  (void)ParseHello(span, &hello);
  (void)ValidateHeartbeat(header);
  CHECK(sink != UINT64_MAX);  // keeps the reads: no sum of bytes comes near
  return 0;
}
