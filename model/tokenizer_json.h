#pragma once

// The parts of a tokenizer.json that Tokenizer is built from. Parsing is strict: an unknown key or
// a setting that would change token ids and is not implemented is an error that names it.

#include <array>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/ids.h"
#include "model/added_tokens.h"
#include "model/bpe.h"

namespace moebius::model {

struct TokenizerJson {
  std::vector<std::string> split_expressions;          // in the order of application
  std::vector<std::pair<TokenId, std::string>> vocab;  // id and its literal string; ids are unique
  std::array<TokenId, 256> byte_ids{};                 // id of every single byte
  std::vector<BytePairEncoder::Merge> merges;          // by rank
  std::vector<AddedToken> added_tokens;                // unique by id and content
};

// Ids are below 2^24.
absl::StatusOr<TokenizerJson> ParseTokenizerJson(absl::string_view json);

}  // namespace moebius::model
