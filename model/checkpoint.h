#pragma once

// The weights of a model directory: model.safetensors, or model.safetensors.index.json and its
// shards, as one name space. Open reads and checks every header (a few megabytes even for
// DeepSeek-V3) and cross-checks the index; tensor data are mapped shard by shard when first used,
// so a process touches only what it hosts.
//
// Immutable after Open; const members may be called from any thread. Views into tensor data live as
// long as the Checkpoint.

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "model/safetensors.h"

namespace moebius::model {

inline constexpr char kSingleFileName[] = "model.safetensors";
inline constexpr char kIndexFileName[] = "model.safetensors.index.json";

// True if `name` is a plain file name ending in ".safetensors": no path separator, no "..", no
// control character. Anything else in an index could name a file outside the directory.
bool IsSafeShardName(absl::string_view name);

struct CheckpointIndex {
  // (tensor, shard) in the order of the file; tensor names are unique, shard names are safe.
  std::vector<std::pair<std::string, std::string>> weight_map;
};

// The JSON of an index file. metadata is ignored (total_size is not to be trusted).
absl::StatusOr<CheckpointIndex> ParseCheckpointIndex(absl::string_view json);

class Checkpoint {
 public:
  // A tensor and the file that holds it.
  struct Entry {
    const SafetensorsFile* file = nullptr;
    const TensorInfo* info = nullptr;
  };

  // Errors name file, tensor and field. With an index: every tensor of weight_map must be in the
  // shard it names, and no shard may hold a tensor that weight_map does not place there.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& dir);

  const std::string& dir() const { return dir_; }
  // All tensors in ascending order of name.
  absl::Span<const Entry> entries() const { return entries_; }
  // In order of name; one for a single-file checkpoint.
  absl::Span<const std::unique_ptr<SafetensorsFile>> files() const { return files_; }

  // {nullptr, nullptr} if there is no such tensor.
  Entry Find(absl::string_view name) const;
  bool HasPrefix(absl::string_view prefix) const;

  // The tensor's bytes. NOT_FOUND names the directory and tensor.
  absl::StatusOr<absl::Span<const std::byte>> Bytes(absl::string_view name) const;

 private:
  Checkpoint() = default;
  absl::Status AddFile(const std::string& path);
  absl::Status BuildNameSpace();

  std::string dir_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::vector<Entry> entries_;
  absl::flat_hash_map<absl::string_view, Entry> by_name_;
};

}  // namespace moebius::model
