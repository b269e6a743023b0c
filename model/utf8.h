#pragma once

// UTF-8 as tokenizers need it: telling valid text from stray bytes, and turning a byte stream into
// text piecewise. Invalid bytes become U+FFFD, one for each maximal subpart of an ill-formed
// sequence (Unicode 15 section 3.9, table 3-8), as Python's errors="replace" and Rust's
// from_utf8_lossy do. Pure functions and a small value class.

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"

namespace moebius::model {

struct Utf8Step {
  enum class Kind {
    kValid,       // one code point of `length` bytes
    kInvalid,     // `length` bytes (1 to 3) that no continuation can make valid
    kIncomplete,  // the text ends within a sequence that is valid so far; `length` = all of it
  };
  Kind kind = Kind::kInvalid;
  size_t length = 0;
};

// Looks at the beginning of `text`. REQUIRES: !text.empty().
Utf8Step NextUtf8(absl::string_view text);

// The longest prefix that is valid UTF-8, and the longest prefix without any valid code point.
size_t ValidUtf8Prefix(absl::string_view text);
size_t InvalidUtf8Prefix(absl::string_view text);

// Bytes in, text out, never a part of a code point. For any split of the input into pieces, the
// concatenated results of Append and Finish are the same.
class Utf8Stream {
 public:
  // Text that is final after these bytes; an incomplete sequence (at most 3 bytes) is kept.
  std::string Append(absl::string_view bytes);
  // The rest: U+FFFD if a sequence was left incomplete. The stream is then as new.
  std::string Finish();
  bool pending() const { return !pending_.empty(); }

 private:
  std::string pending_;
};

}  // namespace moebius::model
