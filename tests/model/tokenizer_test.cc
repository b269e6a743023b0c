// Goal: what the golden comparison cannot see: special tokens, stray bytes, long inputs, a
// directory without a tokenizer, and that every unsupported or malformed setting is refused by
// name. Method: the test tokenizer of tests/model/golden and single edits of it.

#include "model/tokenizer.h"

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/prng.h"
#include "gtest/gtest.h"
#include "tests/model/test_dir.h"

namespace moebius::model {
namespace {

constexpr auto kMatch = Tokenizer::AddedTokens::kMatch;
constexpr auto kIgnore = Tokenizer::AddedTokens::kIgnore;

const std::string& Json() {
  static const auto* json = [] {
    std::ifstream file(MOEBIUS_SOURCE_DIR "/tests/model/golden/tokenizer.json");
    return new std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }();
  return *json;
}

const Tokenizer& Golden() {
  static const auto* tokenizer = new absl::StatusOr<Tokenizer>(Tokenizer::Parse(Json()));
  EXPECT_TRUE(tokenizer->ok()) << tokenizer->status();
  return **tokenizer;
}

TEST(Tokenizer, MarkersAreIdsOnlyWhereTheyMayBe) {
  const Tokenizer& t = Golden();
  const TokenId bos = *t.AddedTokenId("<｜begin▁of▁sentence｜>");
  const TokenId user = *t.AddedTokenId("<｜User｜>");
  EXPECT_EQ(bos, 0);
  EXPECT_EQ(t.AddedTokenId("<|User|>"), std::nullopt);
  const std::string text = "<｜begin▁of▁sentence｜>Hello<｜User｜>";
  const auto matched = *t.Encode(text, kMatch);
  EXPECT_EQ(matched.front(), bos);
  EXPECT_EQ(matched.back(), user);
  const auto ignored = *t.Encode(text, kIgnore);
  for (const TokenId id : ignored) {
    EXPECT_NE(id, bos);
    EXPECT_NE(id, user);
  }
  EXPECT_EQ(t.Decode(ignored, false), text);
  EXPECT_TRUE(t.IsSpecial(bos));
  EXPECT_FALSE(t.IsSpecial(user));
  EXPECT_EQ(t.Decode(matched, true), "Hello<｜User｜>");
  EXPECT_EQ(t.Decode(matched, false), text);
}

TEST(Tokenizer, IdsWithoutATokenGiveNothing) {
  const Tokenizer& t = Golden();
  for (const TokenId id : {TokenId{-1}, TokenId{5'000'000}, static_cast<TokenId>(t.id_limit())}) {
    EXPECT_FALSE(t.IsToken(id));
    EXPECT_FALSE(t.IsSpecial(id));
    EXPECT_EQ(t.TokenBytes(id), "");
    EXPECT_EQ(t.Decode({id}, false), "");
    EXPECT_EQ(StreamDecoder(t, false).Append(id), "");
  }
}

TEST(Tokenizer, StrayBytesSurviveTheRoundTrip) {
  const Tokenizer& t = Golden();
  Prng prng(9);
  for (int round = 0; round < 500; ++round) {
    std::string bytes;
    for (uint64_t i = prng.Below(40); i > 0; --i) {
      bytes.push_back(
          static_cast<char>(prng.Below(4) == 0 ? prng.Below(256) : 'a' + prng.Below(4)));
    }
    const auto ids = t.Encode(bytes, kMatch);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(t.DecodeBytes(*ids, false), bytes);
  }
  EXPECT_EQ(t.Decode(*t.Encode("a\xFFz", kMatch), false), "a\xEF\xBF\xBDz");
}

TEST(Tokenizer, AMegabyteOfAnythingIsFast) {
  const Tokenizer& t = Golden();
  std::string prose, hostile;
  while (prose.size() < 1'000'000) prose += "Hello world, these are 12345 words; naïve 中文\n";
  while (hostile.size() < 1'000'000) hostile += "<｜begin▁of▁sentence";
  for (const std::string& text :
       {prose, hostile, std::string(1'000'000, ' '), std::string(1'000'000, 'a'),
        std::string(1'000'000, '\xFF'), std::string(1'000'000, '\n')}) {
    const auto start = std::chrono::steady_clock::now();
    const auto ids = t.Encode(text, kMatch);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(t.DecodeBytes(*ids, false), text);
    // Quadratic work would take minutes; the bound is loose for sanitizers and busy machines.
    EXPECT_LT(took.count(), 20.0) << text.substr(0, 20);
  }
}

TEST(Tokenizer, BothSpellingsOfMergesMeanTheSame) {
  const size_t begin = Json().find("\"merges\":[") + 10;
  const std::string merges = Json().substr(begin, Json().size() - begin);
  ASSERT_EQ(merges[0], '[');
  // The fixture has pairs; write them as "a b".
  std::string joined = absl::StrReplaceAll(merges, {{"\",\"", " "}});
  joined = absl::StrReplaceAll(joined, {{"[\"", "\""}, {"\"]", "\""}});
  const auto other = Tokenizer::Parse(Json().substr(0, begin) + joined);
  ASSERT_TRUE(other.ok()) << other.status();
  const std::string text = "Hello world, these are words again and again";
  EXPECT_EQ(*other->Encode(text, kMatch), *Golden().Encode(text, kMatch));
}

TEST(Tokenizer, WhatWouldChangeTheIdsIsRefusedByName) {
  struct Case {
    const char* from;
    const char* to;
    const char* field;
  };
  const Case cases[] = {
      {"\"truncation\":null", "\"truncation\":{\"max_length\":5}", "truncation"},
      {"\"padding\":null", "\"padding\":{}", "padding"},
      {"\"normalizer\":null", "\"normalizer\":{\"type\":\"NFC\"}", "normalizer"},
      {"\"post_processor\":null", "\"post_processor\":{\"type\":\"BertProcessing\"}",
       "post_processor"},
      {"\"version\"", "\"surprise\":1,\"version\"", "surprise"},
      {"\"behavior\":\"Isolated\"", "\"behavior\":\"Removed\"", "behavior"},
      {"\"invert\":false", "\"invert\":true", "invert"},
      {"\"pattern\":{\"Regex\"", "\"pattern\":{\"String\"", "pattern"},
      {"\"use_regex\":false", "\"use_regex\":true", "use_regex"},
      {"\"add_prefix_space\":false", "\"add_prefix_space\":true", "add_prefix_space"},
      {"\"type\":\"Split\"", "\"type\":\"Digits\"", "pretokenizers[0]"},
      {"\\\\p{N}{1,3}", "\\\\d{1,3}", "pre_tokenizer"},
      {"\"lstrip\":false", "\"lstrip\":true", "lstrip"},
      {"\"single_word\":false", "\"single_word\":true", "single_word"},
      {"\"type\":\"BPE\"", "\"type\":\"Unigram\"", "model.type"},
      {"\"dropout\":null", "\"dropout\":0.1", "dropout"},
      {"\"unk_token\":null", "\"unk_token\":\"<unk>\"", "unk_token"},
      {"\"byte_fallback\":false", "\"byte_fallback\":true", "byte_fallback"},
      {"\"ignore_merges\":false", "\"ignore_merges\":true", "ignore_merges"},
      {"\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"WordPiece\"", "decoder"},
      {"\"id\":1,", "\"id\":0,", "occurs twice"},
      {"\"id\":1,", "\"id\":-1,", "added_tokens[1].id"},
      {"\"id\":1,", "\"id\":99999999999,", "added_tokens[1].id"},
      {"\"content\":\"<think>\"", "\"content\":\"\"", "content"},
      {"\"content\":\"<｜end▁of▁sentence｜>\"", "\"content\":\"other\"", "contradicts model.vocab"},
      {"\"Ġ\":", "\"Ġ \":", "no token for byte 32"},
      {"\"!\":3,", "\"!\":4,", "occurs twice"},
      {"\"!\":3,", "\"!\":\"3\",", "model.vocab"},
      {"\"merges\":[", "\"merges\":[[\"!\",\"!\"],", "merges[0]"},
      {"\"merges\":[", "\"merges\":[\"!\",", "merges[0]"},
      {"\"merges\":[", "\"merges\":[7,", "merges[0]"},
  };
  for (const Case& c : cases) {
    std::string edited = Json();
    const size_t at = edited.find(c.from);
    ASSERT_NE(at, std::string::npos) << c.from;
    edited.replace(at, std::string(c.from).size(), c.to);
    const absl::Status status = Tokenizer::Parse(edited).status();
    EXPECT_FALSE(status.ok()) << c.to;
    EXPECT_TRUE(absl::StrContains(status.message(), "tokenizer")) << c.to << " -> " << status;
    EXPECT_TRUE(absl::StrContains(status.message(), c.field)) << c.to << " -> " << status;
  }
  EXPECT_FALSE(Tokenizer::Parse("").ok());
  EXPECT_FALSE(Tokenizer::Parse("[]").ok());
  EXPECT_FALSE(Tokenizer::Parse("{}").ok());
}

TEST(Tokenizer, EmptyNormalizerAndTemplatesArePassedOver) {
  for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
           {"\"normalizer\":null", R"("normalizer":{"type":"Sequence","normalizers":[]})"},
           {"\"post_processor\":null",
            R"("post_processor":{"type":"ByteLevel","add_prefix_space":true})"}}) {
    EXPECT_TRUE(Tokenizer::Parse(absl::StrReplaceAll(Json(), {{from, to}})).ok()) << to;
  }
}

TEST(Tokenizer, ADirectoryWithoutOneSaysSo) {
  const std::string dir = TestDir() + "/moebius_no_tokenizer";
  std::filesystem::create_directories(dir);
  EXPECT_EQ(Tokenizer::Load(dir).status().code(), absl::StatusCode::kNotFound);
  std::ofstream(dir + "/tokenizer.json") << Json();
  EXPECT_TRUE(Tokenizer::Load(dir).ok());
  std::ofstream(dir + "/tokenizer.json") << "{";
  EXPECT_TRUE(absl::StrContains(Tokenizer::Load(dir).status().message(), dir));
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace moebius::model
