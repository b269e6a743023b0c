// Feeds arbitrary text to the parser of token-id lists: what is accepted are ids, one for each
// item.

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "services/cli/token_ids_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto ids = moebius::services::ParseTokenIds(text);
  if (!ids.ok()) return 0;
  for (const moebius::TokenId id : *ids) CHECK(id >= 0);
  const auto again =
      moebius::services::ParseTokenIds(absl::StrCat("[", absl::StrJoin(*ids, ","), "]"));
  CHECK(again.ok());
  CHECK(*again == *ids);
  return 0;
}
