#include "model/chat_template_choice.h"

#include <cstdint>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "model/json_value.h"

namespace moebius::model {
namespace {

constexpr uint64_t kMaxBytes = 16 << 20;
constexpr char kField[] = "chat_template";

}  // namespace

ChatTemplate IdentifyChatTemplate(absl::string_view jinja) {
  if (!absl::StrContains(jinja, kUserMarker) || !absl::StrContains(jinja, kAssistantMarker)) {
    return ChatTemplate::kOther;
  }
  // R1 as first published closes stored reasoning only ("</think>"); later texts open it too.
  const bool tags = absl::StrContains(jinja, "</think>") || absl::StrContains(jinja, "<think>");
  const bool is_switched = absl::StrContains(jinja, "thinking");
  if (is_switched) {
    return absl::StrContains(jinja, "</think>") ? ChatTemplate::kV31 : ChatTemplate::kOther;
  }
  return tags ? ChatTemplate::kR1 : ChatTemplate::kV3;
}

absl::StatusOr<ChatTemplate> ParseChatTemplateChoice(absl::string_view tokenizer_config) {
  ASSIGN_OR_RETURN(const JsonValue root, ParseJson(tokenizer_config));
  if (root.AsObject() == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("expected an object, found ", root.KindName()));
  }
  const JsonValue* field = root.Find(kField);
  if (field == nullptr || field->is_null()) return ChatTemplate::kV3;
  if (const std::string* jinja = field->AsString()) return IdentifyChatTemplate(*jinja);
  const JsonValue::Array* list = field->AsArray();
  if (list == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        kField, ": expected a string or a list of named templates, found ", field->KindName()));
  }
  for (size_t i = 0; i < list->size(); ++i) {
    const JsonValue* name = (*list)[i].Find("name");
    const JsonValue* jinja = (*list)[i].Find("template");
    if (name == nullptr || name->AsString() == nullptr || jinja == nullptr ||
        jinja->AsString() == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(kField, "[", i, "]: name or template is missing or no string"));
    }
    if (*name->AsString() == "default") return IdentifyChatTemplate(*jinja->AsString());
  }
  return absl::InvalidArgumentError(
      absl::StrCat(kField, ": none of ", list->size(), " templates is named \"default\""));
}

absl::StatusOr<ChatTemplate> LoadChatTemplate(const std::string& dir) {
  const std::string jinja_path = absl::StrCat(dir, "/", kChatTemplateFileName);
  const absl::StatusOr<std::string> jinja = ReadSmallFile(jinja_path, kMaxBytes);
  if (jinja.ok()) return IdentifyChatTemplate(*jinja);
  if (!absl::IsNotFound(jinja.status())) return jinja.status();
  const std::string config_path = absl::StrCat(dir, "/", kTokenizerConfigFileName);
  const absl::StatusOr<std::string> config = ReadSmallFile(config_path, kMaxBytes);
  if (absl::IsNotFound(config.status())) return ChatTemplate::kV3;
  RETURN_IF_ERROR(config.status());
  const absl::StatusOr<ChatTemplate> choice = ParseChatTemplateChoice(*config);
  return choice.ok() ? choice : Annotate(choice.status(), config_path);
}

}  // namespace moebius::model
