// Goal: dispatch and combine payloads are accepted exactly as built; every wrong count, order, size
// and range is refused with the field named.

#include "proto/wire/dispatch.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::wire {
namespace {

RowLimits Limits(bool e4m3) {
  RowLimits limits;
  limits.hidden = 160;  // a ragged last block
  limits.layers = 3;
  limits.experts_per_layer = 8;
  limits.top_k = 2;
  limits.max_rows = 16;
  limits.e4m3 = e4m3;
  return limits;
}

// Two rows (numbers 3 and 7): experts {1, 5} and {2}.
struct Dispatch {
  explicit Dispatch(bool e4m3) : limits(Limits(e4m3)) {
    header.type = static_cast<uint16_t>(FrameType::kDispatch);
    header.layer = 1;
    header.row_count = 2;
    header.item_count = 3;
    header.row_bytes = EncodedRowBytes(limits);
    const DispatchLayout layout = LayoutOfDispatch(limits, 2, 3);
    storage.resize(layout.total_bytes + 64);
    auto address = reinterpret_cast<uintptr_t>(storage.data());
    payload = storage.data() + (64 - address % 64) % 64;
    size = layout.total_bytes;
    const DispatchRow rows[2] = {{3, 2}, {7, 1}};
    const uint32_t experts[3] = {1, 5, 2};
    std::memcpy(payload, rows, sizeof(rows));
    std::memcpy(payload + layout.experts_offset, experts, sizeof(experts));
  }
  DispatchRow* rows() { return reinterpret_cast<DispatchRow*>(payload); }
  uint32_t* experts() {
    return reinterpret_cast<uint32_t*>(payload + LayoutOfDispatch(limits, 2, 3).experts_offset);
  }
  absl::Status Parse() { return DispatchView::Parse(header, {payload, size}, limits, &view); }

  RowLimits limits;
  FrameHeader header;
  std::vector<std::byte> storage;
  std::byte* payload;
  size_t size;
  DispatchView view;
};

TEST(DispatchView, ReadsWhatWasBuilt) {
  for (bool e4m3 : {false, true}) {
    Dispatch dispatch(e4m3);
    ASSERT_TRUE(dispatch.Parse().ok());
    EXPECT_EQ(dispatch.view.row_count(), 2u);
    EXPECT_EQ(dispatch.view.item_count(), 3u);
    EXPECT_EQ(dispatch.view.experts()[2], 2u);
    EXPECT_EQ(dispatch.view.codes() != nullptr, e4m3);
    EXPECT_EQ(dispatch.view.bf16_rows() != nullptr, !e4m3);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(e4m3 ? static_cast<const void*>(dispatch.view.scales())
                                               : dispatch.view.bf16_rows()) %
                  64,
              0u);
  }
}

TEST(DispatchView, NamesWhatIsWrong) {
  const auto expect = [](const std::function<void(Dispatch&)>& spoil, const std::string& field) {
    Dispatch dispatch(true);
    spoil(dispatch);
    const absl::Status status = dispatch.Parse();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_NE(std::string(status.message()).find(field), std::string::npos) << status;
  };
  expect([](Dispatch& d) { d.header.row_count = 0; }, "row_count");
  expect([](Dispatch& d) { d.header.row_count = 17; }, "row_count");
  expect([](Dispatch& d) { d.header.layer = 3; }, "layer");
  expect([](Dispatch& d) { d.header.item_count = 0; }, "item_count");
  expect([](Dispatch& d) { d.header.item_count = 5; }, "item_count");
  expect([](Dispatch& d) { d.header.row_bytes = 160; }, "row_bytes");
  expect([](Dispatch& d) { d.size -= 1; }, "payload");
  expect([](Dispatch& d) { d.rows()[1].row = 3; }, "rows[1].row");
  expect([](Dispatch& d) { d.rows()[1].row = 16; }, "rows[1].row");
  expect([](Dispatch& d) { d.rows()[0].item_count = 3; }, "rows[0].item_count");
  expect([](Dispatch& d) { d.rows()[0].item_count = 0; }, "rows[0].item_count");
  expect([](Dispatch& d) { d.rows()[0].item_count = 1; }, "item_count");
  expect([](Dispatch& d) { d.experts()[1] = 1; }, "expert 1 at item 1");
  expect([](Dispatch& d) { d.experts()[2] = 8; }, "expert 8 at item 2");
}

TEST(CombineView, ReadsAndRefuses) {
  const RowLimits limits = Limits(true);
  FrameHeader header;
  header.type = static_cast<uint16_t>(FrameType::kCombine);
  header.item_count = 2;
  std::vector<std::byte> storage(CombineBytes(limits, 2) + 64);
  std::byte* payload =
      storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64;
  auto* items = reinterpret_cast<CombineItem*>(payload);
  items[0] = {3, 1};
  items[1] = {15, 7};
  CombineView view;
  const size_t size = CombineBytes(limits, 2);
  ASSERT_TRUE(CombineView::Parse(header, {payload, size}, limits, &view).ok());
  EXPECT_EQ(view.items()[1].expert, 7u);
  EXPECT_FALSE(CombineView::Parse(header, {payload, size - 2}, limits, &view).ok());
  items[1] = {16, 7};
  EXPECT_FALSE(CombineView::Parse(header, {payload, size}, limits, &view).ok());
  items[1] = {15, 8};
  EXPECT_FALSE(CombineView::Parse(header, {payload, size}, limits, &view).ok());
  items[1] = {15, 7};
  header.type = static_cast<uint16_t>(FrameType::kNotHosted);
  EXPECT_FALSE(CombineView::Parse(header, {payload, size}, limits, &view).ok());
  ASSERT_TRUE(CombineView::Parse(header, {payload, 2 * sizeof(CombineItem)}, limits, &view).ok());
  EXPECT_EQ(view.rows(), nullptr);
}

// What lies between the sections is zero whatever the buffer held, and nothing else is touched.
TEST(Padding, IsZeroedAndOnlyThePadding) {
  for (bool e4m3 : {false, true}) {
    const RowLimits limits = Limits(e4m3);
    const DispatchLayout layout = LayoutOfDispatch(limits, 2, 3);
    std::vector<std::byte> payload(layout.total_bytes, std::byte{0xa5});
    ZeroDispatchPadding(limits, 2, 3, payload.data());
    std::vector<bool> data(payload.size(), false);
    const auto section = [&](uint64_t begin, uint64_t bytes) {
      std::fill_n(data.begin() + static_cast<ptrdiff_t>(begin), bytes, true);
    };
    section(0, 2 * sizeof(DispatchRow));
    section(layout.experts_offset, 3 * sizeof(uint32_t));
    section(layout.rows_offset, 2 * 160 * (e4m3 ? 1 : 2));
    if (e4m3) section(layout.scales_offset, 2 * 2 * sizeof(float));
    for (size_t i = 0; i < payload.size(); ++i) {
      ASSERT_EQ(payload[i], data[i] ? std::byte{0xa5} : std::byte{0}) << "byte " << i;
    }
    std::vector<std::byte> combine(CombineBytes(limits, 3), std::byte{0xa5});
    ZeroCombinePadding(3, combine.data());
    for (size_t i = 0; i < combine.size(); ++i) {
      const bool gap = i >= 3 * sizeof(CombineItem) && i < CombineRowsOffset(3);
      ASSERT_EQ(combine[i], gap ? std::byte{0} : std::byte{0xa5}) << "byte " << i;
    }
  }
}

}  // namespace
}  // namespace moebius::wire
