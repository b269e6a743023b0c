#include "model/checkpoint.h"

#include <algorithm>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "model/json_value.h"

namespace moebius::model {
namespace {

constexpr uint64_t kMaxIndexBytes = 256 << 20;
constexpr size_t kMaxShards = 10'000;

}  // namespace

bool IsSafeShardName(absl::string_view name) {
  if (name.size() > 255 || !absl::EndsWith(name, ".safetensors") || name[0] == '.') return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return c != '/' && c != '\\' && static_cast<unsigned char>(c) >= 0x20 && c != 0x7F;
  });
}

absl::StatusOr<CheckpointIndex> ParseCheckpointIndex(absl::string_view json) {
  JsonLimits limits;
  limits.max_values = 4'000'000;
  absl::StatusOr<JsonValue> root = ParseJson(json, limits);
  if (!root.ok()) return Annotate(root.status(), "index");
  const JsonValue* map = root->Find("weight_map");
  if (map == nullptr || map->AsObject() == nullptr) {
    return absl::InvalidArgumentError("index field weight_map: missing or not an object");
  }
  CheckpointIndex index;
  for (const auto& [tensor, shard] : *map->AsObject()) {
    const std::string* file = shard.AsString();
    if (file == nullptr || !IsSafeShardName(*file)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "index field weight_map: tensor \"", tensor.substr(0, 200), "\": ",
          file == nullptr ? shard.KindName() : absl::StrCat("\"", file->substr(0, 200), "\""),
          " is not a plain .safetensors file name"));
    }
    index.weight_map.emplace_back(tensor, *file);
  }
  return index;
}

absl::Status Checkpoint::AddFile(const std::string& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path));
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::Status Checkpoint::BuildNameSpace() {
  for (const auto& file : files_) {
    for (const TensorInfo& tensor : file->header().tensors) {
      const Entry entry{file.get(), &tensor};
      const auto [it, inserted] = by_name_.emplace(tensor.name, entry);
      if (!inserted) {
        return absl::InvalidArgumentError(absl::StrCat(file->path(), ": tensor \"", tensor.name,
                                                       "\" is also in ", it->second.file->path()));
      }
      entries_.push_back(entry);
    }
  }
  std::sort(entries_.begin(), entries_.end(),
            [](const Entry& a, const Entry& b) { return a.info->name < b.info->name; });
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& dir) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint());
  checkpoint->dir_ = dir;
  const std::string single = absl::StrCat(dir, "/", kSingleFileName);
  const std::string index_path = absl::StrCat(dir, "/", kIndexFileName);
  const bool has_index = FileExists(index_path);
  if (FileExists(single)) {
    if (has_index) {
      return absl::InvalidArgumentError(absl::StrCat(dir, ": holds both ", kSingleFileName, " and ",
                                                     kIndexFileName, "; which one is meant?"));
    }
    RETURN_IF_ERROR(checkpoint->AddFile(single));
    RETURN_IF_ERROR(checkpoint->BuildNameSpace());
    return checkpoint;
  }
  if (!has_index) {
    return absl::NotFoundError(
        absl::StrCat(dir, ": holds neither ", kSingleFileName, " nor ", kIndexFileName));
  }
  ASSIGN_OR_RETURN(const std::string json, ReadSmallFile(index_path, kMaxIndexBytes));
  const absl::StatusOr<CheckpointIndex> index = ParseCheckpointIndex(json);
  if (!index.ok()) return Annotate(index.status(), index_path);
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : index->weight_map) shards.insert(shard);
  if (shards.empty() || shards.size() > kMaxShards) {
    return absl::InvalidArgumentError(
        absl::StrCat(index_path, ": names ", shards.size(), " shards, expected 1 to ", kMaxShards));
  }
  for (const std::string& shard : shards) {
    RETURN_IF_ERROR(checkpoint->AddFile(absl::StrCat(dir, "/", shard)));
  }
  RETURN_IF_ERROR(checkpoint->BuildNameSpace());
  for (const auto& [tensor, shard] : index->weight_map) {
    const Entry entry = checkpoint->Find(tensor);
    if (entry.file == nullptr || entry.file->path() != absl::StrCat(dir, "/", shard)) {
      return absl::InvalidArgumentError(absl::StrCat(
          index_path, ": weight_map places tensor \"", tensor, "\" in ", shard, ", ",
          entry.file == nullptr ? "no shard holds it" : "it is in " + entry.file->path()));
    }
  }
  // Every entry of the map exists once; equal counts leave no tensor outside the map.
  if (checkpoint->entries_.size() != index->weight_map.size()) {
    std::set<absl::string_view> mapped;
    for (const auto& [tensor, shard] : index->weight_map) mapped.insert(tensor);
    for (const Entry& entry : checkpoint->entries_) {
      if (mapped.count(entry.info->name) == 0) {
        return absl::InvalidArgumentError(absl::StrCat(entry.file->path(), ": tensor \"",
                                                       entry.info->name,
                                                       "\" is not in the index's weight_map"));
      }
    }
  }
  return checkpoint;
}

Checkpoint::Entry Checkpoint::Find(absl::string_view name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? Entry{} : it->second;
}

bool Checkpoint::HasPrefix(absl::string_view prefix) const {
  const auto it = std::lower_bound(
      entries_.begin(), entries_.end(), prefix,
      [](const Entry& entry, absl::string_view key) { return entry.info->name < key; });
  return it != entries_.end() && absl::StartsWith(it->info->name, prefix);
}

absl::StatusOr<absl::Span<const std::byte>> Checkpoint::Bytes(absl::string_view name) const {
  const Entry entry = Find(name);
  if (entry.file == nullptr) {
    return absl::NotFoundError(absl::StrCat(dir_, ": tensor \"", name, "\" is missing"));
  }
  return entry.file->Bytes(*entry.info);
}

}  // namespace moebius::model
