// Feeds arbitrary tokenizer.json texts. What is accepted must encode and decode without harm.

#include <cstdint>

#include "base/check.h"
#include "model/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using moebius::model::Tokenizer;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto tokenizer = Tokenizer::Parse(text);
  if (!tokenizer.ok()) return 0;
  const std::string sample = "Hello, 1234 \n\n  \xE4\xB8\xAD <think> \xFF";
  for (const auto added : {Tokenizer::AddedTokens::kMatch, Tokenizer::AddedTokens::kIgnore}) {
    const auto ids = tokenizer->Encode(sample, added);
    if (!ids.ok()) continue;  // an expression may backtrack beyond the limit
    CHECK(tokenizer->DecodeBytes(*ids, false) == sample);
  }
  return 0;
}
