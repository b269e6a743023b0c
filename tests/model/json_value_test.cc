// Goal: JSON from outside is read strictly (no duplicate keys, no trailing or hidden text, bounded
// depth and size, integers stay integers) and written back as the same value.

#include "model/json_value.h"

#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace moebius::model {
namespace {

TEST(Json, KindsAreKeptApart) {
  const auto json = ParseJson(
      R"({"u": 18446744073709551615, "n": -5, "d": 1.0, "e": 1e3, "big": 18446744073709551616,
          "s": "\u00e9\ud83d\ude00", "t": true, "z": null, "a": [1, []], "o": {}})");
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ(*json->Find("u")->AsUint(), 18446744073709551615u);
  EXPECT_EQ(*json->Find("n")->AsNegativeInt(), -5);
  for (const char* key : {"n", "d", "e", "big", "s", "t", "z", "a", "o"}) {
    EXPECT_EQ(json->Find(key)->AsUint(), nullptr) << key;
  }
  EXPECT_EQ(*json->Find("s")->AsString(), "\u00e9\U0001F600");
  double number = 0;
  EXPECT_TRUE(json->Find("e")->GetNumber(&number));
  EXPECT_EQ(number, 1000);
  EXPECT_TRUE(json->Find("z")->is_null());
  EXPECT_EQ(json->Find("a")->AsArray()->size(), 2u);
  EXPECT_EQ(json->Find("nobody"), nullptr);
  EXPECT_EQ(json->Find("a")->Find("x"), nullptr);
}

TEST(Json, WhatIsNotStrictIsRefused) {
  const std::string cases[] = {"",
                               " ",
                               "{",
                               "[1,]",
                               "{\"a\":1,}",
                               "{\"a\":1,\"a\":1}",
                               "[{\"b\":{\"a\":1,\"a\":2}}]",
                               "{'a':1}",
                               "[1] [2]",
                               "1 x",
                               "// c\n1",
                               "[NaN]",
                               "[01]",
                               "[+1]",
                               "[1e999]",
                               "\"\xFF\"",
                               "\"\xED\xA0\x80\"",
                               "\"\\ud800\"",
                               "\"a\nb\"",
                               "\xEF\xBB\xBF{}",
                               std::string("1\0", 2),
                               std::string("{\0}", 3),
                               "\"\\x41\""};
  for (const std::string& text : cases) {
    const absl::Status status = ParseJson(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_TRUE(absl::StrContains(status.message(), "JSON")) << status;
  }
}

TEST(Json, DepthAndCountAreBounded) {
  EXPECT_TRUE(ParseJson(std::string(16, '[') + std::string(16, ']')).ok());
  EXPECT_FALSE(ParseJson(std::string(17, '[') + std::string(17, ']')).ok());
  EXPECT_FALSE(ParseJson(std::string(10'000'000, '[')).ok());
  JsonLimits limits;
  limits.max_values = 4;
  EXPECT_TRUE(ParseJson("[1,2,3]", limits).ok());
  EXPECT_FALSE(ParseJson("[1,2,3,4]", limits).ok());
}

TEST(Json, WritesWhatItReads) {
  const std::string text = R"({"b":[1,-2,0.1,"x\"\\\n",true,null,{}],"a":{"k":[]}})";
  const auto json = ParseJson(text);
  ASSERT_TRUE(json.ok());
  EXPECT_EQ(WriteJson(*json, -1), text);
  const auto again = ParseJson(WriteJson(*json, 2));
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(WriteJson(*again, -1), text);
}

TEST(Json, WritesLargeObjectsInLinearTime) {
  JsonValue::Object object;
  for (int i = 0; i < 200'000; ++i) object.emplace_back(absl::StrCat(i), JsonValue::OfUint(1));
  const std::string text = WriteJson(JsonValue::OfObject(std::move(object)), -1);
  EXPECT_EQ(ParseJson(text)->AsObject()->size(), 200'000u);
}

}  // namespace
}  // namespace moebius::model
