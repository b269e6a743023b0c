#pragma once

// Whole-file reading and replacing, for the small files of a checkpoint directory (config, index,
// manifest, tokenizer). Errors name the path. Any thread.

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace moebius::model {

// True if `path` names something (of any kind).
bool FileExists(const std::string& path);

// The bytes of a regular file. Errors: NOT_FOUND; RESOURCE_EXHAUSTED above max_bytes (checked
// before anything is read); INVALID_ARGUMENT if it is not a regular file.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, uint64_t max_bytes);

// Writes a temporary file beside `path`, syncs it and renames it over `path`, so that a reader sees
// the old or the new content, never a part.
absl::Status ReplaceFile(const std::string& path, absl::string_view content);

// The Status for a failed system call: "path: what: reason".
absl::Status ErrnoStatus(int error, absl::string_view path, absl::string_view what);

}  // namespace moebius::model
