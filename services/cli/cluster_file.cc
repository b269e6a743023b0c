#include "services/cli/cluster_file.h"

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "model/json_value.h"
#include "nlohmann/json.hpp"

namespace moebius::services {

absl::StatusOr<SavedCluster> ParseClusterFile(absl::string_view json) {
  ASSIGN_OR_RETURN(const model::JsonValue root, model::ParseJson(json));
  SavedCluster saved;
  const model::JsonValue* gateway = root.Find("gateway");
  const model::JsonValue* controller = root.Find("controller");
  const model::JsonValue* list = root.Find("processes");
  if (gateway == nullptr || gateway->AsString() == nullptr || controller == nullptr ||
      controller->AsString() == nullptr || list == nullptr || list->AsArray() == nullptr) {
    return absl::InvalidArgumentError("gateway, controller or processes is missing");
  }
  saved.gateway = *gateway->AsString();
  saved.controller = *controller->AsString();
  if (const model::JsonValue* replicas = root.Find("replicas")) {
    if (replicas->AsUint() == nullptr || *replicas->AsUint() < 1 || *replicas->AsUint() > 64) {
      return absl::InvalidArgumentError("replicas: not a number from 1 to 64");
    }
    saved.replicas = static_cast<int>(*replicas->AsUint());
  }
  for (const model::JsonValue& item : *list->AsArray()) {
    const model::JsonValue* name = item.Find("name");
    const model::JsonValue* pid = item.Find("pid");
    if (name == nullptr || name->AsString() == nullptr || pid == nullptr ||
        pid->AsUint() == nullptr || *pid->AsUint() > INT32_MAX) {
      return absl::InvalidArgumentError(
          absl::StrCat("processes[", saved.processes.size(), "]: no name, or no process id"));
    }
    saved.processes.push_back({*name->AsString(), static_cast<pid_t>(*pid->AsUint())});
  }
  return saved;
}

std::string WriteClusterFile(const SavedCluster& cluster) {
  nlohmann::json json;
  json["gateway"] = cluster.gateway;
  json["controller"] = cluster.controller;
  json["replicas"] = cluster.replicas;
  json["processes"] = nlohmann::json::array();
  for (const SavedProcess& process : cluster.processes) {
    json["processes"].push_back({{"name", process.name}, {"pid", process.pid}});
  }
  return json.dump(1, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace);
}

absl::StatusOr<SavedCluster> ReadClusterFile(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, model::ReadSmallFile(path, 1 << 20));
  absl::StatusOr<SavedCluster> cluster = ParseClusterFile(text);
  return cluster.ok() ? cluster : Annotate(cluster.status(), path);
}

}  // namespace moebius::services
