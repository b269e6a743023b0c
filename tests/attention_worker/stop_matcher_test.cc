#include "attention_worker/stop_matcher.h"

#include <string>
#include <vector>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::attention_worker {
namespace {

TEST(StopMatcherTest, FindsAMatchWithinAPiece) {
  StopMatcher matcher({"stop"});
  EXPECT_FALSE(matcher.Append("go on "));
  EXPECT_TRUE(matcher.Append("and stop here"));
  EXPECT_TRUE(matcher.Append("anything"));  // stays matched
}

TEST(StopMatcherTest, FindsAMatchAcrossPieces) {
  StopMatcher matcher({"\n\nUser:"});
  EXPECT_FALSE(matcher.Append("end.\n"));
  EXPECT_FALSE(matcher.Append("\n"));
  EXPECT_FALSE(matcher.Append("Us"));
  EXPECT_FALSE(matcher.Append(""));
  EXPECT_TRUE(matcher.Append("er: hi"));
}

TEST(StopMatcherTest, AFalseStartDoesNotHideTheRealOne) {
  StopMatcher matcher({"aab"});
  EXPECT_FALSE(matcher.Append("a"));
  EXPECT_FALSE(matcher.Append("a"));
  EXPECT_FALSE(matcher.Append("a"));
  EXPECT_TRUE(matcher.Append("b"));
}

TEST(StopMatcherTest, EmptyStringsNeverMatch) {
  StopMatcher matcher({"", "x"});
  EXPECT_FALSE(matcher.Append("abc"));
  EXPECT_TRUE(matcher.Append("x"));
  EXPECT_TRUE(StopMatcher({""}).empty());
  EXPECT_FALSE(StopMatcher({""}).Append("abc"));
}

TEST(StopMatcherTest, OneByteStopKeepsNoTail) {
  StopMatcher matcher({"."});
  EXPECT_FALSE(matcher.Append("no full stop yet"));
  EXPECT_TRUE(matcher.Append("."));
}

// However the text is cut, the match is found in the piece in which it is completed.
TEST(StopMatcherTest, RandomCutsAgreeWithASearchOfTheWhole) {
  Prng prng(7);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::string> stops(1 + prng.Below(3));
    for (std::string& stop : stops) {
      for (uint64_t i = 1 + prng.Below(4); i > 0; --i)
        stop += static_cast<char>('a' + prng.Below(2));
    }
    std::string seen;
    bool expected = false;
    StopMatcher matcher(stops);
    for (int piece = 0; piece < 12 && !expected; ++piece) {
      std::string text;
      for (uint64_t i = prng.Below(4); i > 0; --i) text += static_cast<char>('a' + prng.Below(2));
      seen += text;
      for (const std::string& stop : stops) expected |= seen.find(stop) != std::string::npos;
      ASSERT_EQ(matcher.Append(text), expected) << seen;
    }
  }
}

}  // namespace
}  // namespace moebius::attention_worker
