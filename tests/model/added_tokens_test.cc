// Goal: matching is leftmost-longest and verbatim tokens go before normalized ones, as in Hugging
// Face's tokenizers.

#include "model/added_tokens.h"

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace moebius::model {
namespace {

std::string Split(const std::vector<AddedToken>& tokens, absl::string_view text) {
  std::string out;
  for (const auto& part : AddedTokenMatcher(tokens).Split(text)) {
    absl::StrAppend(&out, out.empty() ? "" : "|", part.text);
    if (part.id >= 0) absl::StrAppend(&out, "=", part.id);
  }
  return out;
}

TEST(AddedTokens, LeftmostThenLongest) {
  const std::vector<AddedToken> tokens = {
      {1, "<a", true, false}, {2, "<ab>", true, false}, {3, "b", true, false}};
  EXPECT_EQ(Split(tokens, "x<ab>y"), "x|<ab>=2|y");
  EXPECT_EQ(Split(tokens, "<abc"), "<a=1|b=3|c");
  EXPECT_EQ(Split(tokens, "<<a<ab><a"), "<|<a=1|<ab>=2|<a=1");
  EXPECT_EQ(Split(tokens, ""), "");
  EXPECT_EQ(Split({}, "<ab>"), "<ab>");
}

TEST(AddedTokens, VerbatimTokensGoBeforeNormalizedOnes) {
  // On its own the normalized token would be leftmost.
  const std::vector<AddedToken> tokens = {{1, "ab", false, true}, {2, "bc", false, false}};
  EXPECT_EQ(Split(tokens, "abc"), "a|bc=2");
  EXPECT_EQ(Split(tokens, "abxbc"), "ab=1|x|bc=2");
}

}  // namespace
}  // namespace moebius::model
