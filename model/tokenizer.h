#pragma once

// Text to token ids and back: byte-level BPE as described by a Hugging Face tokenizer.json
// (pre_tokenizer: Split expressions, then ByteLevel; model: BPE; decoder: ByteLevel). Everything in
// the file that would change the ids and is not implemented is refused by name, so that a loaded
// tokenizer gives the ids of Hugging Face's `tokenizers` for every valid UTF-8 text (code points
// assigned after Unicode 14 excepted, see model/pretokenizer.h).
//
// Encoding applies no template: no start or end token is added. Text that is not UTF-8 is encoded
// too, stray bytes by themselves; decoding gives the bytes back (DecodeBytes) or U+FFFD for them
// (Decode).
//
// Immutable after loading; every const member may be called from any thread. Texts are prompts:
// they never appear in errors.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/ids.h"
#include "model/added_tokens.h"
#include "model/bpe.h"
#include "model/pretokenizer.h"
#include "model/utf8.h"

namespace moebius::model {

inline constexpr char kTokenizerFileName[] = "tokenizer.json";

class Tokenizer {
 public:
  // Whether text may contain added tokens. Content from users is encoded with kIgnore, so that it
  // cannot forge control markers.
  enum class AddedTokens : uint8_t { kMatch, kIgnore };

  // Errors: INVALID_ARGUMENT (malformed) or UNIMPLEMENTED (a setting we do not serve), naming the
  // field.
  static absl::StatusOr<Tokenizer> Parse(absl::string_view json);

  // `dir`/tokenizer.json. NOT_FOUND if there is none: such a model serves token ids only.
  static absl::StatusOr<Tokenizer> Load(const std::string& dir);

  // Errors: RESOURCE_EXHAUSTED if a Split expression backtracks without end, or the text is over
  // 1 GiB.
  absl::StatusOr<std::vector<TokenId>> Encode(absl::string_view text, AddedTokens added) const;

  // Ids that no token has (the padding rows of an output head) give nothing. With skip_special,
  // neither do tokens flagged special; role, think and tool markers are not.
  std::string DecodeBytes(absl::Span<const TokenId> ids, bool skip_special) const;
  std::string Decode(absl::Span<const TokenId> ids, bool skip_special) const;

  // The bytes one token stands for; empty if no token has the id.
  absl::string_view TokenBytes(TokenId id) const;
  bool IsToken(TokenId id) const;
  bool IsSpecial(TokenId id) const;
  // The id of an added token, by its exact content.
  std::optional<TokenId> AddedTokenId(absl::string_view content) const;

  // One above the highest id. A model's vocab_size may be larger (padding), never smaller.
  int64_t id_limit() const { return static_cast<int64_t>(tokens_.size()); }

 private:
  struct Token {
    std::string bytes;
    bool exists = false;
    bool special = false;
  };
  Tokenizer(PreTokenizer pre_tokenizer, BytePairEncoder bpe)
      : pre_tokenizer_(std::move(pre_tokenizer)), bpe_(std::move(bpe)) {}

  absl::Status EncodeText(absl::string_view text, std::vector<TokenId>& ids) const;

  PreTokenizer pre_tokenizer_;
  BytePairEncoder bpe_;
  AddedTokenMatcher matcher_;
  std::vector<Token> tokens_;  // by id
  absl::flat_hash_map<std::string, TokenId> added_ids_;
};

// Token by token to text that never ends within a code point: the pieces concatenate to what
// Decode gives for all ids. Value type; the tokenizer must outlive it.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
      : tokenizer_(&tokenizer), skip_special_(skip_special) {}
  // Text that became final; often empty for scripts whose characters span tokens.
  std::string Append(TokenId id);
  // At the end: U+FFFD if the tokens stopped within a code point.
  std::string Finish() { return stream_.Finish(); }

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  Utf8Stream stream_;
};

}  // namespace moebius::model
