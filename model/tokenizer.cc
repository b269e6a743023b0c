#include "model/tokenizer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/byte_alphabet.h"
#include "model/file_io.h"
#include "model/tokenizer_json.h"

namespace moebius::model {
namespace {

constexpr uint64_t kMaxTokenizerBytes = 256 << 20;
constexpr size_t kMaxTextBytes = size_t{1} << 30;

}  // namespace

absl::StatusOr<Tokenizer> Tokenizer::Parse(absl::string_view json) {
  ASSIGN_OR_RETURN(const TokenizerJson parts, ParseTokenizerJson(json));
  absl::StatusOr<PreTokenizer> pre_tokenizer = PreTokenizer::Create(parts.split_expressions);
  if (!pre_tokenizer.ok()) {
    return Annotate(pre_tokenizer.status(), "tokenizer field pre_tokenizer");
  }
  Tokenizer tokenizer(*std::move(pre_tokenizer), BytePairEncoder(parts.byte_ids, parts.merges));
  TokenId highest = 0;
  for (const auto& [id, name] : parts.vocab) highest = std::max(highest, id);
  for (const AddedToken& token : parts.added_tokens) highest = std::max(highest, token.id);
  tokenizer.tokens_.resize(static_cast<size_t>(highest) + 1);
  for (const auto& [id, name] : parts.vocab) {
    Token& token = tokenizer.tokens_[id];
    token.exists = true;
    // A name outside the byte alphabet stands for itself (control tokens listed in the vocabulary).
    token.bytes = BytesOfSymbols(name).value_or(name);
  }
  for (const AddedToken& added : parts.added_tokens) {
    tokenizer.tokens_[added.id] = {added.content, true, added.special};
    tokenizer.added_ids_[added.content] = added.id;
  }
  tokenizer.matcher_ = AddedTokenMatcher(parts.added_tokens);
  return tokenizer;
}

absl::StatusOr<Tokenizer> Tokenizer::Load(const std::string& dir) {
  const std::string path = absl::StrCat(dir, "/", kTokenizerFileName);
  ASSIGN_OR_RETURN(const std::string json, ReadSmallFile(path, kMaxTokenizerBytes));
  absl::StatusOr<Tokenizer> tokenizer = Parse(json);
  if (!tokenizer.ok()) return Annotate(tokenizer.status(), path);
  return tokenizer;
}

absl::Status Tokenizer::EncodeText(absl::string_view text, std::vector<TokenId>& ids) const {
  std::vector<absl::string_view> pieces;
  RETURN_IF_ERROR(pre_tokenizer_.Split(text, pieces));
  for (const absl::string_view piece : pieces) bpe_.Encode(piece, ids);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TokenId>> Tokenizer::Encode(absl::string_view text,
                                                       AddedTokens added) const {
  if (text.size() > kMaxTextBytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("text of ", text.size(), " bytes, at most ", kMaxTextBytes, " are encoded"));
  }
  std::vector<TokenId> ids;
  if (added == AddedTokens::kIgnore) {
    RETURN_IF_ERROR(EncodeText(text, ids));
    return ids;
  }
  for (const AddedTokenMatcher::Part& part : matcher_.Split(text)) {
    if (part.id >= 0) {
      ids.push_back(part.id);
    } else {
      RETURN_IF_ERROR(EncodeText(part.text, ids));
    }
  }
  return ids;
}

std::string Tokenizer::DecodeBytes(absl::Span<const TokenId> ids, bool skip_special) const {
  std::string bytes;
  for (const TokenId id : ids) {
    if (skip_special && IsSpecial(id)) continue;
    absl::StrAppend(&bytes, TokenBytes(id));
  }
  return bytes;
}

std::string Tokenizer::Decode(absl::Span<const TokenId> ids, bool skip_special) const {
  Utf8Stream stream;
  std::string text = stream.Append(DecodeBytes(ids, skip_special));
  return text + stream.Finish();
}

absl::string_view Tokenizer::TokenBytes(TokenId id) const {
  return IsToken(id) ? absl::string_view(tokens_[id].bytes) : absl::string_view();
}

bool Tokenizer::IsToken(TokenId id) const {
  return id >= 0 && id < id_limit() && tokens_[id].exists;
}

bool Tokenizer::IsSpecial(TokenId id) const { return IsToken(id) && tokens_[id].special; }

std::optional<TokenId> Tokenizer::AddedTokenId(absl::string_view content) const {
  const auto it = added_ids_.find(content);
  if (it == added_ids_.end()) return std::nullopt;
  return it->second;
}

std::string StreamDecoder::Append(TokenId id) {
  if (skip_special_ && tokenizer_->IsSpecial(id)) return "";
  return stream_.Append(tokenizer_->TokenBytes(id));
}

}  // namespace moebius::model
