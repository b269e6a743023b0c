// Goal: a list of ids is read exactly or refused with the item named.

#include "services/cli/token_ids_file.h"

#include "gtest/gtest.h"

namespace moebius::services {
namespace {

TEST(TokenIds, ReadsAList) {
  const auto ids = ParseTokenIds(" [1, 2,\n 2147483647] ");
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ(*ids, (std::vector<TokenId>{1, 2, 2147483647}));
  EXPECT_TRUE(ParseTokenIds("[]")->empty());
}

TEST(TokenIds, RefusesEverythingElse) {
  for (const char* text : {"", "{}", "1", "[1", "[1,]", "[1.5]", "[-1]", "[\"1\"]", "[2147483648]",
                           "[null]", "[1] x"}) {
    EXPECT_EQ(ParseTokenIds(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  EXPECT_NE(ParseTokenIds("[1, 2, -3]").status().message().find("item 2"), absl::string_view::npos);
}

}  // namespace
}  // namespace moebius::services
