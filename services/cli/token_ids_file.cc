#include "services/cli/token_ids_file.h"

#include <cstdint>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "model/json_value.h"

namespace moebius::services {

absl::StatusOr<std::vector<TokenId>> ParseTokenIds(absl::string_view json) {
  ASSIGN_OR_RETURN(const model::JsonValue value, model::ParseJson(json));
  const model::JsonValue::Array* list = value.AsArray();
  if (list == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("token ids: expected a list of integers, found ", value.KindName()));
  }
  std::vector<TokenId> ids;
  ids.reserve(list->size());
  for (const model::JsonValue& item : *list) {
    const uint64_t* id = item.AsUint();
    if (id == nullptr || *id > INT32_MAX) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ids: item ", ids.size(), " is not an id"));
    }
    ids.push_back(static_cast<TokenId>(*id));
  }
  return ids;
}

absl::StatusOr<std::vector<TokenId>> ReadTokenIds(const std::string& path) {
  constexpr uint64_t kLimit = 64 << 20;
  if (path == "-") {
    std::string text;
    for (char block[4096]; std::cin.read(block, sizeof(block)) || std::cin.gcount() > 0;) {
      text.append(block, static_cast<size_t>(std::cin.gcount()));
      if (text.size() > kLimit) {
        return absl::InvalidArgumentError("token ids: standard input is larger than 64 MiB");
      }
    }
    return ParseTokenIds(text);
  }
  ASSIGN_OR_RETURN(const std::string text, model::ReadSmallFile(path, kLimit));
  absl::StatusOr<std::vector<TokenId>> ids = ParseTokenIds(text);
  return ids.ok() ? ids : Annotate(ids.status(), path);
}

}  // namespace moebius::services
