#pragma once

// Added tokens: strings that are matched literally in raw text before anything else (control
// markers such as the begin-of-sentence token). Matching is leftmost-longest, in two passes as
// Hugging Face's tokenizers do it: tokens declared `normalized: false` first, then, in what is
// left, the `normalized: true` ones. Immutable; any thread.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "base/ids.h"

namespace moebius::model {

struct AddedToken {
  TokenId id = 0;
  std::string content;  // not empty
  bool special = false;
  bool normalized = false;
};

// Longest content accepted, in bytes: bounds the matching time per byte of text.
inline constexpr size_t kMaxAddedTokenBytes = 256;

class AddedTokenMatcher {
 public:
  // A part of the text: an added token, or (id < 0) text between them.
  struct Part {
    absl::string_view text;
    TokenId id = -1;
  };

  AddedTokenMatcher() = default;
  explicit AddedTokenMatcher(const std::vector<AddedToken>& tokens);

  // The parts of `text` in order; none is empty.
  std::vector<Part> Split(absl::string_view text) const;

 private:
  struct Trie {
    struct Node {
      TokenId id = -1;
      absl::flat_hash_map<unsigned char, int32_t> children;
    };
    std::vector<Node> nodes = std::vector<Node>(1);
    void Add(absl::string_view content, TokenId id);
    // Id of the longest token at the beginning of `text`, and its length; id < 0: none.
    TokenId Match(absl::string_view text, size_t* length) const;
    void Split(absl::string_view text, std::vector<Part>& parts) const;
  };
  Trie verbatim_;
  Trie normalized_;
};

}  // namespace moebius::model
