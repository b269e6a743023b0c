#pragma once

// Early return of errors. Debian 12's Abseil (20220623) has none of these.
//
//   RETURN_IF_ERROR(Open(path));
//   ASSIGN_OR_RETURN(Config config, ParseConfig(text));
//   return Annotate(status, "loading layers.7.mlp.experts.12.down_proj");

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace moebius {

// `status` with `context` and ": " put before its message; the code is kept. Adds context once per
// layer. REQUIRES: !status.ok().
inline absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

}  // namespace moebius

#define MOEBIUS_CONCAT_INNER(a, b) a##b
#define MOEBIUS_CONCAT(a, b) MOEBIUS_CONCAT_INNER(a, b)

#define RETURN_IF_ERROR(expression)                           \
  do {                                                        \
    if (absl::Status status_ = (expression); !status_.ok()) { \
      return status_;                                         \
    }                                                         \
  } while (false)

#define ASSIGN_OR_RETURN(lhs, expression) \
  ASSIGN_OR_RETURN_INNER(MOEBIUS_CONCAT(status_or_, __LINE__), lhs, expression)

#define ASSIGN_OR_RETURN_INNER(result, lhs, expression) \
  auto result = (expression);                           \
  if (!result.ok()) return std::move(result).status();  \
  lhs = *std::move(result)
