// Goal: text falls into the same pieces as in Hugging Face's Split pre-tokenizer with the DeepSeek
// expressions, stray bytes stay apart, and expressions that the two engines read differently are
// refused. Method: published vectors, then hand-made ones for each rule.

#include "model/pretokenizer.h"

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "gtest/gtest.h"

namespace moebius::model {
namespace {

using Pieces = std::vector<std::string>;

const std::vector<std::string>& DeepSeek() {
  static const auto* expressions = new std::vector<std::string>{
      R"(\p{N}{1,3})", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
      R"re([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+)re"
      R"re(| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)re"};
  return *expressions;
}

Pieces Split(const std::string& text, const std::vector<std::string>& expressions = DeepSeek()) {
  const auto pre_tokenizer = PreTokenizer::Create(expressions);
  EXPECT_TRUE(pre_tokenizer.ok()) << pre_tokenizer.status();
  std::vector<absl::string_view> pieces;
  const absl::Status status = pre_tokenizer->Split(text, pieces);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(absl::StrJoin(pieces, ""), text);
  Pieces out;
  for (const absl::string_view piece : pieces) {
    EXPECT_FALSE(piece.empty());
    out.emplace_back(piece);
  }
  return out;
}

TEST(PreTokenizer, SplitsThePublishedVectors) {
  EXPECT_EQ(Split("Hello, WORLD!! How's it going? 123 \u4e00\u4e8c\u4e09"),
            (Pieces{"Hello", ",", " WORLD", "!!", " How", "'s", " it", " going", "?", " ", "123",
                    " ", "\u4e00\u4e8c\u4e09"}));
  EXPECT_EQ(Split("    int x = 1234;\n"),
            (Pieces{"   ", " int", " x", " =", " ", "123", "4", ";\n"}));
  EXPECT_EQ(Split("a.b_c  d\r\n\r\n e"), (Pieces{"a", ".b", "_c", " ", " d", "\r\n\r\n", " e"}));
  EXPECT_EQ(Split(""), Pieces{});
}

TEST(PreTokenizer, DigitsGroupFromTheLeftInEveryScript) {
  EXPECT_EQ(Split("1234567"), (Pieces{"123", "456", "7"}));
  EXPECT_EQ(Split("\u0663\u0664\u0665\u0666"), (Pieces{"\u0663\u0664\u0665", "\u0666"}));
  EXPECT_EQ(Split("x\u00bd\u2167y"), (Pieces{"x", "\u00bd\u2167", "y"}));
}

TEST(PreTokenizer, WhiteSpaceIsUnicodes) {
  // No-break space is white space; the Mongolian vowel separator and the zero-width space are not.
  EXPECT_EQ(Split("a \u00a0 b"), (Pieces{"a", " \u00a0", " b"}));
  EXPECT_EQ(Split("a\u180e\u180eb"), (Pieces{"a", "\u180e", "\u180eb"}));
  EXPECT_EQ(Split("a\u0085\u0085b"), (Pieces{"a", "\u0085", "\u0085b"}));
}

TEST(PreTokenizer, APieceDoesNotSeeItsNeighbours) {
  // The digit ends the first piece, so the spaces before it are at an end of text.
  EXPECT_EQ(Split("a   1"), (Pieces{"a", "   ", "1"}));
  EXPECT_EQ(Split("a   b"), (Pieces{"a", "  ", " b"}));
}

TEST(PreTokenizer, StrayBytesAreTheirOwnPieces) {
  EXPECT_EQ(Split("ab\xFF\xFE zz"), (Pieces{"ab", "\xFF\xFE", " zz"}));
  EXPECT_EQ(Split("\xE4\xB8"), (Pieces{"\xE4\xB8"}));
  EXPECT_EQ(Split(std::string("a\0b", 3)), (Pieces{"a", std::string("\0b", 2)}));
}

TEST(PreTokenizer, WithoutExpressionsTextIsOnePiece) {
  EXPECT_EQ(Split("a b", {}), (Pieces{"a b"}));
}

TEST(PreTokenizer, AmbiguousOrUnsafeExpressionsAreRefused) {
  for (const char* expression :
       {"a*",      "(a|)",      "[a&&b]",  "[a[b]]", "[^]a]", "\\d+",   "\\w",
        "[\\S]",   "\\K",       "^a",      "a$",     ".+",    "(?i:a)", "(?<=a)b",
        "(?<n>a)", "(*ACCEPT)", "a{1,3}+", "\\1",    "\\x41", "\\C",    "a\\"}) {
    EXPECT_FALSE(PreTokenizer::Create({expression}).ok()) << expression;
  }
  for (const char* expression : {"(a", "[a", "a)", "*", "\\p{Nope}", "a{3,1}"}) {
    EXPECT_EQ(PreTokenizer::Create({expression}).status().code(),
              absl::StatusCode::kInvalidArgument)
        << expression;
  }
  EXPECT_TRUE(absl::StrContains(PreTokenizer::Create({"\\d+"}).status().message(), "\\d"));
}

TEST(PreTokenizer, EndlessBacktrackingIsStoppedWithAnError) {
  const auto pre_tokenizer = PreTokenizer::Create({"(?:a+)+b"});
  ASSERT_TRUE(pre_tokenizer.ok());
  std::vector<absl::string_view> pieces;
  // The b at the end is out of the a's reach; without one PCRE2 would not even begin.
  const std::string text = std::string(64, 'a') + "cb";
  EXPECT_EQ(pre_tokenizer->Split(text, pieces).code(), absl::StatusCode::kResourceExhausted);
}

TEST(PreTokenizer, LongRunsAreOneOrTwoPieces) {
  const std::string spaces(3'000'000, ' ');
  EXPECT_EQ(Split(spaces).size(), 1u);
  EXPECT_EQ(Split(spaces + "x").size(), 2u);
  EXPECT_EQ(Split(std::string(3'000'000, 'x')).size(), 1u);
  EXPECT_EQ(Split(spaces + "\n").size(), 1u);
}

}  // namespace
}  // namespace moebius::model
