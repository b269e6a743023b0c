#pragma once

// Splits text into the pieces that BPE merges within: a sequence of regular expressions, each
// applied to every piece the previous one left; matches become pieces and so do the gaps between
// them (Hugging Face's Split with behaviour Isolated). A piece is matched as a text of its own:
// assertions do not see its neighbours.
//
// The expressions are written for Oniguruma and run on PCRE2 (UTF, UCP, leftmost-first as both
// are). Where the two differ the expression is translated (\s and \S: Unicode White_Space) or
// refused. PCRE2 10.42 knows Unicode 14: code points assigned later count as unassigned.
//
// Bytes that are not UTF-8 belong to no expression's match: a run of them is a piece of its own.
//
// Immutable; Split may be called from any thread. Time is linear in the text for the expressions of
// published tokenizers; one that backtracks without end is stopped by a limit, with an error.

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace moebius::model {

class PreTokenizer {
 public:
  // Errors: INVALID_ARGUMENT (malformed), UNIMPLEMENTED (a construct that means different things in
  // the two engines); both quote the expression.
  static absl::StatusOr<PreTokenizer> Create(const std::vector<std::string>& expressions);
  ~PreTokenizer();
  PreTokenizer(PreTokenizer&&) noexcept;
  PreTokenizer& operator=(PreTokenizer&&) noexcept;

  // Appends the pieces in order; they are not empty, refer to `text` and concatenate to it.
  // Errors: RESOURCE_EXHAUSTED if an expression backtracks beyond the limit.
  absl::Status Split(absl::string_view text, std::vector<absl::string_view>& pieces) const;

 private:
  class Expression;
  PreTokenizer() = default;
  std::vector<std::unique_ptr<Expression>> expressions_;
};

// The expression in PCRE2's language; exposed for tests.
absl::StatusOr<std::string> TranslateExpression(absl::string_view expression);

}  // namespace moebius::model
