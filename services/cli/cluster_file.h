#pragma once

// cluster.json of a state directory: what runs there, for the next supervisor. Outside bytes like
// any file: read strictly. No gRPC.

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace moebius::services {

struct SavedProcess {
  std::string name;  // "expert-1"
  pid_t pid = 0;     // 0: not running when the file was written
  friend bool operator==(const SavedProcess&, const SavedProcess&) = default;
};

struct SavedCluster {
  std::string gateway;  // addresses
  std::string controller;
  int replicas = 1;  // of each expert
  std::vector<SavedProcess> processes;
  friend bool operator==(const SavedCluster&, const SavedCluster&) = default;
};

// INVALID_ARGUMENT names what is missing or wrong. Unknown members are ignored.
absl::StatusOr<SavedCluster> ParseClusterFile(absl::string_view json);
std::string WriteClusterFile(const SavedCluster& cluster);
// NOT_FOUND without such a file.
absl::StatusOr<SavedCluster> ReadClusterFile(const std::string& path);

}  // namespace moebius::services
