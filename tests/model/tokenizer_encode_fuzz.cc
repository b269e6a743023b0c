// Encodes arbitrary bytes with the test tokenizer: they always come back, whole and streamed.

#include <cstdint>
#include <fstream>
#include <iterator>

#include "base/check.h"
#include "model/tokenizer.h"

namespace {

const moebius::model::Tokenizer& TestTokenizer() {
  static const auto* tokenizer = [] {
    std::ifstream file(MOEBIUS_SOURCE_DIR "/tests/model/golden/tokenizer.json");
    const std::string json((std::istreambuf_iterator<char>(file)),
                           std::istreambuf_iterator<char>());
    auto parsed = moebius::model::Tokenizer::Parse(json);
    CHECK(parsed.ok());
    return new moebius::model::Tokenizer(*std::move(parsed));
  }();
  return *tokenizer;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using moebius::model::StreamDecoder;
  using moebius::model::Tokenizer;
  const Tokenizer& tokenizer = TestTokenizer();
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  for (const auto added : {Tokenizer::AddedTokens::kMatch, Tokenizer::AddedTokens::kIgnore}) {
    const auto ids = tokenizer.Encode(text, added);
    CHECK(ids.ok());
    CHECK(tokenizer.DecodeBytes(*ids, false) == text);
    for (const bool skip_special : {false, true}) {
      StreamDecoder decoder(tokenizer, skip_special);
      std::string streamed;
      for (const moebius::TokenId id : *ids) {
        const std::string piece = decoder.Append(id);
        CHECK_EQ(moebius::model::ValidUtf8Prefix(piece), piece.size());
        streamed += piece;
      }
      streamed += decoder.Finish();
      CHECK(streamed == tokenizer.Decode(*ids, skip_special));
    }
  }
  return 0;
}
