#pragma once

// Which of the published chat templates a model directory asks for. The template is Jinja text; it
// is recognised by what only one of them says and never run (model/chat_template.h renders).
//
// Pure but for LoadChatTemplate, which reads the directory. Any thread.

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/chat_template.h"

namespace moebius::model {

inline constexpr char kTokenizerConfigFileName[] = "tokenizer_config.json";
inline constexpr char kChatTemplateFileName[] = "chat_template.jinja";

// By its own text:
//   kV31    has V3's markers, the switch `thinking` and the tag </think>
//   kR1     has V3's markers and a tag of reasoning, but no switch
//   kV3     has V3's markers and nothing of reasoning
//   kOther  all others: markers of another family, a switch that is none of ours
ChatTemplate IdentifyChatTemplate(absl::string_view jinja);

// From the text of a tokenizer_config.json. Its `chat_template` is a string, or a list of
// {"name", "template"} of which the one named "default" counts. Absent or null is kV3: whether such
// a model has V3's markers is found when a chat is encoded (EncodeChat). Errors: INVALID_ARGUMENT
// names the field.
absl::StatusOr<ChatTemplate> ParseChatTemplateChoice(absl::string_view tokenizer_config);

// `dir`/chat_template.jinja if there is one (it overrides the other, as in transformers), else
// `dir`/tokenizer_config.json, else kV3. Errors name the file.
absl::StatusOr<ChatTemplate> LoadChatTemplate(const std::string& dir);

}  // namespace moebius::model
