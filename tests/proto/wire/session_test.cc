// Goal: session records and route frames are accepted whole or refused with the field named.

#include "proto/wire/session.h"

#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "proto/wire/route.h"

namespace moebius::wire {
namespace {

template <typename Record>
std::vector<std::byte> Bytes(const Record& record) {
  std::vector<std::byte> bytes(sizeof(record));
  std::memcpy(bytes.data(), &record, sizeof(record));
  return bytes;
}

TEST(Hello, NamesWhatIsWrong) {
  HelloRecord good;
  good.node = 1;
  good.incarnation = 2;
  good.credits = 3;
  HelloRecord parsed;
  ASSERT_TRUE(ParseHello(Bytes(good), &parsed).ok());
  EXPECT_EQ(parsed.incarnation, 2u);
  const auto message = [&](HelloRecord record) {
    return std::string(ParseHello(Bytes(record), &parsed).message());
  };
  HelloRecord bad = good;
  bad.node = 0;
  EXPECT_NE(message(bad).find("node"), std::string::npos);
  bad = good;
  bad.incarnation = 0;
  EXPECT_NE(message(bad).find("incarnation"), std::string::npos);
  bad = good;
  bad.credits = 0;
  EXPECT_NE(message(bad).find("credits"), std::string::npos);
  EXPECT_FALSE(ParseHello({}, &parsed).ok());
}

TEST(Heartbeat, IsNumberedAndBare) {
  FrameHeader header;
  EXPECT_NE(ValidateHeartbeat(header).message().find("correlation"), std::string::npos);
  header.correlation = 4;
  EXPECT_TRUE(ValidateHeartbeat(header).ok());
  header.payload_bytes = 16;
  EXPECT_NE(ValidateHeartbeat(header).message().find("payload_bytes"), std::string::npos);
}

TEST(Route, ChecksCountsAndSizes) {
  FrameHeader header;
  header.row_count = 3;
  header.row_bytes = 2 * 64;
  EXPECT_TRUE(ValidateRoute(header, 3 * 128, 64, 8).ok());
  EXPECT_FALSE(ValidateRoute(header, 3 * 128 - 1, 64, 8).ok());
  EXPECT_FALSE(ValidateRoute(header, 3 * 128, 65, 8).ok());
  EXPECT_FALSE(ValidateRoute(header, 3 * 128, 64, 2).ok());
  header.row_count = 0;
  EXPECT_FALSE(ValidateRoute(header, 0, 64, 8).ok());
}

TEST(RouteAbandon, WantsAscendingRows) {
  FrameHeader header;
  header.item_count = 2;
  uint32_t rows[2] = {1, 4};
  const auto check = [&] {
    return ValidateRouteAbandon(header, {reinterpret_cast<std::byte*>(rows), 8}, 8).ok();
  };
  EXPECT_TRUE(check());
  rows[1] = 1;
  EXPECT_FALSE(check());
  rows[1] = 8;
  EXPECT_FALSE(check());
  header.item_count = 3;
  EXPECT_FALSE(check());
}

}  // namespace
}  // namespace moebius::wire
