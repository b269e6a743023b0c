#pragma once

// A JSON list of token ids from a file or standard input ("-"). Outside bytes: strict, bounded,
// never trusted.

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/ids.h"

namespace moebius::services {

// INVALID_ARGUMENT names the item that is not an integer in [0, 2^31).
absl::StatusOr<std::vector<TokenId>> ParseTokenIds(absl::string_view json);
absl::StatusOr<std::vector<TokenId>> ReadTokenIds(const std::string& path);

}  // namespace moebius::services
