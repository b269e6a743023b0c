// Goal: invalid bytes become U+FFFD exactly as Unicode recommends, and streaming gives the same
// text for every way of cutting the input. Method: the Unicode standard's examples; all cuts.

#include "model/utf8.h"

#include <string>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::model {
namespace {

const std::string kBad = "\xEF\xBF\xBD";

std::string Lossy(absl::string_view bytes) {
  Utf8Stream stream;
  const std::string text = stream.Append(bytes);
  return text + stream.Finish();
}

TEST(Utf8, ReplacesMaximalSubparts) {
  // Unicode 15, section 3.9, tables 3-8 to 3-11.
  EXPECT_EQ(Lossy("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            kBad + kBad + kBad + kBad + kBad + kBad + kBad + kBad + "A");
  EXPECT_EQ(Lossy("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            kBad + kBad + kBad + kBad + kBad + kBad + kBad + kBad + "A");
  EXPECT_EQ(Lossy("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),
            kBad + kBad + kBad + kBad + kBad + "A" + kBad + kBad + "B");
  EXPECT_EQ(Lossy("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), kBad + kBad + kBad + kBad + "A");
  EXPECT_EQ(Lossy("\xF0\x9F\x98"), kBad);
  EXPECT_EQ(Lossy("\xF0\x9F\x98\x80"), "\xF0\x9F\x98\x80");
  EXPECT_EQ(Lossy(std::string("a\0b", 3)), std::string("a\0b", 3));
}

TEST(Utf8, StreamingDoesNotDependOnTheCuts) {
  Prng prng(3);
  const std::string alphabet = "a\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80\xFF\xED\xA0";
  for (int round = 0; round < 300; ++round) {
    std::string bytes;
    for (int i = 0; i < 12; ++i) bytes.push_back(alphabet[prng.Below(alphabet.size())]);
    const std::string expected = Lossy(bytes);
    for (int cut = 0; cut < 20; ++cut) {
      Utf8Stream stream;
      std::string text;
      for (size_t at = 0; at < bytes.size();) {
        const size_t length = 1 + prng.Below(3);
        text += stream.Append(bytes.substr(at, length));
        EXPECT_EQ(ValidUtf8Prefix(text), text.size()) << "every piece ends on a code point";
        at += length;
      }
      EXPECT_EQ(text + stream.Finish(), expected);
    }
  }
}

TEST(Utf8, Prefixes) {
  EXPECT_EQ(ValidUtf8Prefix("ab\xC3\xA9\xFFz"), 4u);
  EXPECT_EQ(InvalidUtf8Prefix("\xFF\xE4\xB8z"), 3u);
  EXPECT_EQ(InvalidUtf8Prefix("z"), 0u);
  EXPECT_EQ(InvalidUtf8Prefix("\xE4\xB8"), 2u);
}

}  // namespace
}  // namespace moebius::model
