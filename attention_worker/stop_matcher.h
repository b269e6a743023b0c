#pragma once

// Finds stop strings in bytes that arrive in pieces, across piece borders (also those within a code
// point). Keeps only the tail that a match could still begin in. Owned by one sequence; loop thread
// only.

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace moebius::attention_worker {

class StopMatcher {
 public:
  StopMatcher() = default;
  // Empty strings are ignored (they would match everywhere).
  explicit StopMatcher(std::vector<std::string> stop_strings);

  bool empty() const { return stop_strings_.empty(); }

  // True if a stop string ends within `text`, possibly having begun in earlier text. After true the
  // matcher stays matched.
  bool Append(absl::string_view text);

 private:
  std::vector<std::string> stop_strings_;
  size_t longest_ = 0;
  std::string window_;  // the last longest_ - 1 bytes seen
  bool matched_ = false;
};

}  // namespace moebius::attention_worker
