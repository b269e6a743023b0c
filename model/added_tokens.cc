#include "model/added_tokens.h"

namespace moebius::model {

AddedTokenMatcher::AddedTokenMatcher(const std::vector<AddedToken>& tokens) {
  for (const AddedToken& token : tokens) {
    (token.normalized ? normalized_ : verbatim_).Add(token.content, token.id);
  }
}

void AddedTokenMatcher::Trie::Add(absl::string_view content, TokenId id) {
  int32_t node = 0;
  for (const char c : content) {
    const auto [it, inserted] = nodes[node].children.try_emplace(
        static_cast<unsigned char>(c), static_cast<int32_t>(nodes.size()));
    node = it->second;
    if (inserted) nodes.emplace_back();
  }
  nodes[node].id = id;
}

TokenId AddedTokenMatcher::Trie::Match(absl::string_view text, size_t* length) const {
  TokenId best = -1;
  int32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto it = nodes[node].children.find(static_cast<unsigned char>(text[i]));
    if (it == nodes[node].children.end()) break;
    node = it->second;
    if (nodes[node].id >= 0) {
      best = nodes[node].id;
      *length = i + 1;
    }
  }
  return best;
}

void AddedTokenMatcher::Trie::Split(absl::string_view text, std::vector<Part>& parts) const {
  size_t begin = 0, at = 0;
  while (at < text.size()) {
    size_t length = 0;
    const TokenId id = Match(text.substr(at), &length);
    if (id < 0) {
      ++at;
      continue;
    }
    if (at > begin) parts.push_back({text.substr(begin, at - begin), -1});
    parts.push_back({text.substr(at, length), id});
    at += length;
    begin = at;
  }
  if (begin < text.size()) parts.push_back({text.substr(begin), -1});
}

std::vector<AddedTokenMatcher::Part> AddedTokenMatcher::Split(absl::string_view text) const {
  std::vector<Part> first, parts;
  verbatim_.Split(text, first);
  for (const Part& part : first) {
    if (part.id >= 0) {
      parts.push_back(part);
    } else {
      normalized_.Split(part.text, parts);
    }
  }
  return parts;
}

}  // namespace moebius::model
