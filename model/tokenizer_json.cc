#include "model/tokenizer_json.h"

#include <initializer_list>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/byte_alphabet.h"
#include "model/json_value.h"

namespace moebius::model {
namespace {

constexpr uint64_t kMaxTokenId = (1 << 24) - 1;
constexpr size_t kMaxExpressions = 16;
constexpr size_t kMaxAddedTokens = 100'000;

using VocabMap = absl::flat_hash_map<absl::string_view, TokenId>;

absl::Status Bad(absl::string_view field, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat("tokenizer field ", field, ": ", problem));
}

absl::Status Unsupported(absl::string_view field, absl::string_view problem) {
  return absl::UnimplementedError(absl::StrCat("tokenizer field ", field, ": ", problem));
}

// An object whose keys must all be known; absent and null are the same.
class Section {
 public:
  static absl::StatusOr<Section> Of(const JsonValue* value, absl::string_view path,
                                    std::initializer_list<absl::string_view> known) {
    if (value == nullptr || value->AsObject() == nullptr) {
      return Bad(path, absl::StrCat("is ", value == nullptr ? "missing" : value->KindName(),
                                    ", expected an object"));
    }
    for (const auto& [key, member] : *value->AsObject()) {
      bool found = false;
      for (const absl::string_view name : known) found = found || name == key;
      if (!found) return Unsupported(absl::StrCat(path, ".", key.substr(0, 64)), "unknown setting");
    }
    return Section(*value, path);
  }

  const JsonValue* Find(absl::string_view key) const {
    const JsonValue* value = value_->Find(key);
    return value == nullptr || value->is_null() ? nullptr : value;
  }
  std::string Path(absl::string_view key) const { return absl::StrCat(path_, ".", key); }

  absl::StatusOr<std::string> Text(absl::string_view key) const {
    const JsonValue* value = Find(key);
    if (value == nullptr || value->AsString() == nullptr)
      return Bad(Path(key), "expected a string");
    return *value->AsString();
  }
  absl::StatusOr<bool> Bool(absl::string_view key, bool fallback) const {
    const JsonValue* value = Find(key);
    if (value == nullptr) return fallback;
    if (value->AsBool() == nullptr) return Bad(Path(key), "expected a boolean");
    return *value->AsBool();
  }
  absl::Status RequireBool(absl::string_view key, bool fallback, bool served) const {
    ASSIGN_OR_RETURN(const bool value, Bool(key, fallback));
    if (value == served) return absl::OkStatus();
    return Unsupported(Path(key),
                       absl::StrCat("only ", served ? "true" : "false", " is supported"));
  }
  absl::Status RequireText(absl::string_view key, absl::string_view served) const {
    const absl::StatusOr<std::string> text = Text(key);
    if (!text.ok()) return text.status();
    if (absl::string_view(*text) == served) return absl::OkStatus();
    return Unsupported(
        Path(key), absl::StrCat("\"", text->substr(0, 64), "\" is not supported, only ", served));
  }
  absl::Status RequireType(absl::string_view served) const { return RequireText("type", served); }
  absl::Status RequireAbsent(absl::string_view key) const {
    const JsonValue* value = Find(key);
    if (value == nullptr || (value->AsString() != nullptr && value->AsString()->empty())) {
      return absl::OkStatus();
    }
    return Unsupported(Path(key), "only null is supported");
  }

 private:
  Section(const JsonValue& value, absl::string_view path) : value_(&value), path_(path) {}
  const JsonValue* value_;
  std::string path_;
};

absl::StatusOr<std::string> TypeOf(const JsonValue& value, absl::string_view path) {
  const JsonValue* type = value.Find("type");
  if (type == nullptr || type->AsString() == nullptr) {
    return Bad(absl::StrCat(path, ".type"), "expected a string");
  }
  return *type->AsString();
}

// Only the empty sequence changes nothing.
absl::Status CheckNormalizer(const JsonValue* value) {
  if (value == nullptr || value->is_null()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Section section,
                   Section::Of(value, "normalizer", {"type", "normalizers"}));
  RETURN_IF_ERROR(section.RequireType("Sequence"));
  const JsonValue* list = section.Find("normalizers");
  if (list == nullptr || list->AsArray() == nullptr || !list->AsArray()->empty()) {
    return Unsupported("normalizer", "only null or an empty Sequence is supported");
  }
  return absl::OkStatus();
}

// Post-processors run after ids are made: ByteLevel only moves offsets, and templates add tokens on
// request, which Encode never makes (the chat template writes its own start token).
absl::Status CheckPostProcessor(const JsonValue* value) {
  if (value == nullptr || value->is_null()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string type, TypeOf(*value, "post_processor"));
  if (type == "ByteLevel" || type == "TemplateProcessing") return absl::OkStatus();
  if (type == "Sequence") {
    const JsonValue* list = value->Find("processors");
    if (list == nullptr || list->AsArray() == nullptr) {
      return Bad("post_processor.processors", "expected an array");
    }
    for (const JsonValue& element : *list->AsArray()) {
      ASSIGN_OR_RETURN(const std::string inner, TypeOf(element, "post_processor.processors"));
      if (inner != "ByteLevel" && inner != "TemplateProcessing") {
        return Unsupported("post_processor.processors",
                           absl::StrCat("\"", inner.substr(0, 64), "\" is not supported"));
      }
    }
    return absl::OkStatus();
  }
  return Unsupported("post_processor.type",
                     absl::StrCat("\"", type.substr(0, 64), "\" is not supported"));
}

absl::StatusOr<std::string> ParseSplit(const JsonValue& value, const std::string& path) {
  ASSIGN_OR_RETURN(const Section section,
                   Section::Of(&value, path, {"type", "pattern", "behavior", "invert"}));
  RETURN_IF_ERROR(section.RequireText("behavior", "Isolated"));
  RETURN_IF_ERROR(section.RequireBool("invert", false, false));
  ASSIGN_OR_RETURN(const Section pattern,
                   Section::Of(section.Find("pattern"), section.Path("pattern"), {"Regex"}));
  return pattern.Text("Regex");
}

absl::StatusOr<std::vector<std::string>> ParsePreTokenizer(const JsonValue* value) {
  ASSIGN_OR_RETURN(const Section section,
                   Section::Of(value, "pre_tokenizer", {"type", "pretokenizers"}));
  RETURN_IF_ERROR(section.RequireType("Sequence"));
  const JsonValue* list = section.Find("pretokenizers");
  const JsonValue::Array* elements = list == nullptr ? nullptr : list->AsArray();
  if (elements == nullptr || elements->empty() || elements->size() > kMaxExpressions + 1) {
    return Bad("pre_tokenizer.pretokenizers", "expected Split elements and a final ByteLevel");
  }
  std::vector<std::string> expressions;
  for (size_t i = 0; i < elements->size(); ++i) {
    const std::string path = absl::StrCat("pre_tokenizer.pretokenizers[", i, "]");
    ASSIGN_OR_RETURN(const std::string type, TypeOf((*elements)[i], path));
    if (i + 1 < elements->size()) {
      if (type != "Split") {
        return Unsupported(
            path, absl::StrCat("\"", type.substr(0, 64), "\" is not supported, only Split"));
      }
      ASSIGN_OR_RETURN(std::string expression, ParseSplit((*elements)[i], path));
      expressions.push_back(std::move(expression));
      continue;
    }
    ASSIGN_OR_RETURN(const Section byte_level,
                     Section::Of(&(*elements)[i], path,
                                 {"type", "add_prefix_space", "trim_offsets", "use_regex"}));
    RETURN_IF_ERROR(byte_level.RequireType("ByteLevel"));
    RETURN_IF_ERROR(byte_level.RequireBool("add_prefix_space", true, false));
    RETURN_IF_ERROR(byte_level.RequireBool("use_regex", true, false));
  }
  return expressions;
}

absl::StatusOr<AddedToken> ParseAddedToken(const JsonValue& value, const std::string& path) {
  ASSIGN_OR_RETURN(const Section section, Section::Of(&value, path,
                                                      {"id", "content", "single_word", "lstrip",
                                                       "rstrip", "normalized", "special"}));
  AddedToken token;
  const JsonValue* id = section.Find("id");
  if (id == nullptr || id->AsUint() == nullptr || *id->AsUint() > kMaxTokenId) {
    return Bad(path + ".id", "expected a token id");
  }
  token.id = static_cast<TokenId>(*id->AsUint());
  ASSIGN_OR_RETURN(token.content, section.Text("content"));
  if (token.content.empty() || token.content.size() > kMaxAddedTokenBytes) {
    return Bad(path + ".content",
               absl::StrCat(token.content.size(), " bytes, expected 1 to ", kMaxAddedTokenBytes));
  }
  RETURN_IF_ERROR(section.RequireBool("single_word", false, false));
  RETURN_IF_ERROR(section.RequireBool("lstrip", false, false));
  RETURN_IF_ERROR(section.RequireBool("rstrip", false, false));
  ASSIGN_OR_RETURN(token.special, section.Bool("special", false));
  ASSIGN_OR_RETURN(token.normalized, section.Bool("normalized", !token.special));
  return token;
}

absl::Status ParseAddedTokens(const JsonValue* value, TokenizerJson& out) {
  if (value == nullptr || value->is_null()) return absl::OkStatus();
  const JsonValue::Array* list = value->AsArray();
  if (list == nullptr || list->size() > kMaxAddedTokens) {
    return Bad("added_tokens", absl::StrCat("expected an array of at most ", kMaxAddedTokens));
  }
  absl::flat_hash_set<TokenId> ids;
  absl::flat_hash_set<std::string> contents;
  for (size_t i = 0; i < list->size(); ++i) {
    const std::string path = absl::StrCat("added_tokens[", i, "]");
    ASSIGN_OR_RETURN(AddedToken token, ParseAddedToken((*list)[i], path));
    if (!ids.insert(token.id).second) return Bad(path + ".id", "occurs twice");
    if (!contents.insert(token.content).second) return Bad(path + ".content", "occurs twice");
    out.added_tokens.push_back(std::move(token));
  }
  return absl::OkStatus();
}

absl::StatusOr<VocabMap> ParseVocab(const Section& model, TokenizerJson& out) {
  const JsonValue* vocab = model.Find("vocab");
  if (vocab == nullptr || vocab->AsObject() == nullptr) {
    return Bad("model.vocab", "expected an object");
  }
  VocabMap by_name;
  absl::flat_hash_set<TokenId> ids;
  out.vocab.reserve(vocab->AsObject()->size());
  for (const auto& [name, value] : *vocab->AsObject()) {
    const uint64_t* number = value.AsUint();
    if (number == nullptr || *number > kMaxTokenId) {
      return Bad(absl::StrCat("model.vocab.\"", name.substr(0, 64), "\""), "expected a token id");
    }
    const TokenId id = static_cast<TokenId>(*number);
    if (!ids.insert(id).second) {
      return Bad(absl::StrCat("model.vocab.\"", name.substr(0, 64), "\""),
                 absl::StrCat("id ", id, " occurs twice"));
    }
    by_name.emplace(name, id);
    out.vocab.emplace_back(id, name);
  }
  for (int byte = 0; byte < 256; ++byte) {
    const auto it = by_name.find(ByteSymbol(static_cast<uint8_t>(byte)));
    if (it == by_name.end()) {
      return Unsupported("model.vocab",
                         absl::StrCat("no token for byte ", byte, ": not a byte-level vocabulary"));
    }
    out.byte_ids[byte] = it->second;
  }
  return by_name;
}

// "a b", or ["a", "b"] as newer files have it (then a part may hold a space).
bool SplitMerge(const JsonValue& value, absl::string_view* left, absl::string_view* right) {
  if (const std::string* text = value.AsString()) {
    const size_t space = text->find(' ');
    if (space == std::string::npos || text->find(' ', space + 1) != std::string::npos) return false;
    *left = absl::string_view(*text).substr(0, space);
    *right = absl::string_view(*text).substr(space + 1);
    return true;
  }
  const JsonValue::Array* pair = value.AsArray();
  if (pair == nullptr || pair->size() != 2 || !(*pair)[0].AsString() || !(*pair)[1].AsString()) {
    return false;
  }
  *left = *(*pair)[0].AsString();
  *right = *(*pair)[1].AsString();
  return true;
}

absl::Status ParseMerges(const Section& model, const VocabMap& vocab, TokenizerJson& out) {
  const JsonValue* merges = model.Find("merges");
  if (merges == nullptr || merges->AsArray() == nullptr) {
    return Bad("model.merges", "expected an array");
  }
  absl::flat_hash_set<std::pair<TokenId, TokenId>> seen;
  for (size_t i = 0; i < merges->AsArray()->size(); ++i) {
    const std::string path = absl::StrCat("model.merges[", i, "]");
    absl::string_view left, right;
    if (!SplitMerge((*merges->AsArray())[i], &left, &right)) {
      return Bad(path, "expected \"left right\" or a pair of strings");
    }
    const auto a = vocab.find(left), b = vocab.find(right);
    const auto merged = vocab.find(absl::StrCat(left, right));
    if (a == vocab.end() || b == vocab.end() || merged == vocab.end()) {
      return Bad(path, "a part or the result is not in the vocabulary");
    }
    if (!seen.emplace(a->second, b->second).second) return Bad(path, "occurs twice");
    out.merges.push_back({a->second, b->second, merged->second});
  }
  return absl::OkStatus();
}

absl::StatusOr<VocabMap> ParseModel(const JsonValue* value, TokenizerJson& out) {
  ASSIGN_OR_RETURN(const Section model,
                   Section::Of(value, "model",
                               {"type", "dropout", "unk_token", "continuing_subword_prefix",
                                "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges",
                                "vocab", "merges"}));
  RETURN_IF_ERROR(model.RequireType("BPE"));
  RETURN_IF_ERROR(model.RequireAbsent("dropout"));
  RETURN_IF_ERROR(model.RequireAbsent("unk_token"));
  RETURN_IF_ERROR(model.RequireAbsent("continuing_subword_prefix"));
  RETURN_IF_ERROR(model.RequireAbsent("end_of_word_suffix"));
  RETURN_IF_ERROR(model.RequireBool("byte_fallback", false, false));
  RETURN_IF_ERROR(model.RequireBool("ignore_merges", false, false));
  ASSIGN_OR_RETURN(VocabMap vocab, ParseVocab(model, out));
  RETURN_IF_ERROR(ParseMerges(model, vocab, out));
  return vocab;
}

}  // namespace

absl::StatusOr<TokenizerJson> ParseTokenizerJson(absl::string_view json) {
  JsonLimits limits;
  limits.max_values = 8'000'000;
  absl::StatusOr<JsonValue> parsed = ParseJson(json, limits);
  if (!parsed.ok()) return Annotate(parsed.status(), "tokenizer");
  ASSIGN_OR_RETURN(const Section root,
                   Section::Of(&*parsed, "(root)",
                               {"version", "truncation", "padding", "added_tokens", "normalizer",
                                "pre_tokenizer", "post_processor", "decoder", "model"}));
  TokenizerJson out;
  RETURN_IF_ERROR(root.RequireAbsent("truncation"));
  RETURN_IF_ERROR(root.RequireAbsent("padding"));
  RETURN_IF_ERROR(CheckNormalizer(parsed->Find("normalizer")));
  RETURN_IF_ERROR(CheckPostProcessor(parsed->Find("post_processor")));
  ASSIGN_OR_RETURN(const Section decoder,
                   Section::Of(root.Find("decoder"), "decoder",
                               {"type", "add_prefix_space", "trim_offsets", "use_regex"}));
  RETURN_IF_ERROR(decoder.RequireType("ByteLevel"));
  ASSIGN_OR_RETURN(out.split_expressions, ParsePreTokenizer(root.Find("pre_tokenizer")));
  ASSIGN_OR_RETURN(const VocabMap vocab, ParseModel(root.Find("model"), out));
  RETURN_IF_ERROR(ParseAddedTokens(parsed->Find("added_tokens"), out));
  absl::flat_hash_map<TokenId, absl::string_view> by_id;
  for (const auto& [id, name] : out.vocab) by_id.emplace(id, name);
  for (const AddedToken& token : out.added_tokens) {
    // An added token that is also a vocabulary entry must be the same token under both names.
    const auto same_name = vocab.find(token.content);
    const auto same_id = by_id.find(token.id);
    if ((same_name != vocab.end() && same_name->second != token.id) ||
        (same_id != by_id.end() && same_id->second != token.content)) {
      return Bad("added_tokens", absl::StrCat("id ", token.id, " contradicts model.vocab"));
    }
  }
  return out;
}

}  // namespace moebius::model
