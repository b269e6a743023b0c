// Goal: ids and decoded text equal those of Hugging Face's `tokenizers` on 12,000 strings. Method:
// a committed golden made by tools/tokenizer_oracle/make_golden.py (its docstring has the format).
// MOEBIUS_TOKENIZER_JSON and MOEBIUS_TOKENIZER_CASES name another pair, for live comparisons.

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "base/check.h"
#include "gtest/gtest.h"
#include "model/tokenizer.h"

namespace moebius::model {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good());
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

std::string PathFrom(const char* variable, const char* golden) {
  const char* path = std::getenv(variable);
  return path != nullptr ? path : std::string(MOEBIUS_SOURCE_DIR "/tests/model/golden/") + golden;
}

class GoldenReader {
 public:
  explicit GoldenReader(std::string data) : data_(std::move(data)) {
    CHECK(data_.substr(0, 6) == "MTOK1\n");
  }
  uint64_t Number() {
    uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      const uint64_t byte = static_cast<unsigned char>(data_.at(at_++));
      value |= (byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
  }
  std::string Bytes() {
    const uint64_t size = Number();
    at_ += size;
    CHECK(at_ <= data_.size());
    return data_.substr(at_ - size, size);
  }
  std::vector<TokenId> Ids(uint64_t count) {
    std::vector<TokenId> ids(count);
    for (TokenId& id : ids) id = static_cast<TokenId>(Number());
    return ids;
  }
  bool AtEnd() const { return at_ == data_.size(); }

 private:
  std::string data_;
  size_t at_ = 6;
};

TEST(TokenizerGolden, IdsAndTextEqualTheOracles) {
  const auto tokenizer =
      Tokenizer::Parse(ReadFile(PathFrom("MOEBIUS_TOKENIZER_JSON", "tokenizer.json")));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  GoldenReader golden(ReadFile(PathFrom("MOEBIUS_TOKENIZER_CASES", "tokenizer_cases.bin")));
  const uint64_t texts = golden.Number();
  EXPECT_GE(texts, 10'000u);
  int differences = 0;
  for (uint64_t i = 0; i < texts && differences < 20; ++i) {
    const std::string text = golden.Bytes();
    const std::vector<TokenId> ids = golden.Ids(golden.Number());
    const uint64_t ignored_count = golden.Number();
    const std::vector<TokenId> ignored = ignored_count == 0 ? ids : golden.Ids(ignored_count - 1);
    const auto matched_ids = tokenizer->Encode(text, Tokenizer::AddedTokens::kMatch);
    const auto ignored_ids = tokenizer->Encode(text, Tokenizer::AddedTokens::kIgnore);
    ASSERT_TRUE(matched_ids.ok() && ignored_ids.ok());
    EXPECT_EQ(*matched_ids, ids) << "text: " << text;
    EXPECT_EQ(*ignored_ids, ignored) << "text: " << text;
    EXPECT_EQ(tokenizer->DecodeBytes(ids, false), text);
    EXPECT_EQ(tokenizer->DecodeBytes(*ignored_ids, false), text);
    differences += *matched_ids != ids || *ignored_ids != ignored;
  }
  ASSERT_EQ(differences, 0);
  const uint64_t lists = golden.Number();
  EXPECT_GE(lists, 1'000u);
  for (uint64_t i = 0; i < lists; ++i) {
    const std::vector<TokenId> ids = golden.Ids(golden.Number());
    for (const bool skip_special : {false, true}) {
      const std::string text = golden.Bytes();
      EXPECT_EQ(tokenizer->Decode(ids, skip_special), text);
      StreamDecoder decoder(*tokenizer, skip_special);
      std::string streamed;
      for (const TokenId id : ids) {
        const std::string piece = decoder.Append(id);
        EXPECT_EQ(ValidUtf8Prefix(piece), piece.size());
        streamed += piece;
      }
      EXPECT_EQ(streamed + decoder.Finish(), text);
    }
  }
  EXPECT_TRUE(golden.AtEnd());
}

}  // namespace
}  // namespace moebius::model
