#include "model/chat_template.h"

#include <optional>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace moebius::model {
namespace {

class Renderer {
 public:
  void Marker(absl::string_view marker) { segments_.push_back({true, std::string(marker)}); }
  void Text(absl::string_view text) {
    if (!text.empty()) segments_.push_back({false, std::string(text)});
  }
  std::vector<ChatSegment> Take() && { return std::move(segments_); }

 private:
  std::vector<ChatSegment> segments_;
};

absl::Status CheckRoles(absl::Span<const ChatMessage> messages) {
  if (messages.empty()) return absl::InvalidArgumentError("messages: at least one is needed");
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role == "tool") {
      return absl::UnimplementedError(
          absl::StrCat("messages[", i, "].role: tool results are not supported yet"));
    }
    if (role != "system" && role != "user" && role != "assistant") {
      return absl::InvalidArgumentError(absl::StrCat("messages[", i, "].role: \"",
                                                     role.substr(0, 64),
                                                     "\" is not one of system, user, assistant"));
    }
  }
  return absl::OkStatus();
}

std::vector<ChatSegment> RenderV3(absl::Span<const ChatMessage> messages,
                                  bool add_generation_prompt) {
  Renderer out;
  out.Marker(kBosMarker);
  std::string system;
  bool first = true;
  for (const ChatMessage& message : messages) {
    if (message.role != "system") continue;
    absl::StrAppend(&system, first ? "" : "\n\n", message.content);
    first = false;
  }
  out.Text(system);
  for (const ChatMessage& message : messages) {
    if (message.role == "user") {
      out.Marker(kUserMarker);
      out.Text(message.content);
    } else if (message.role == "assistant") {
      out.Marker(kAssistantMarker);
      out.Text(message.content);
      out.Marker(kEosMarker);
    }
  }
  if (add_generation_prompt) out.Marker(kAssistantMarker);
  return std::move(out).Take();
}

}  // namespace

const char* Name(ChatTemplate chat_template) {
  switch (chat_template) {
    case ChatTemplate::kV3:
      return "deepseek-v3";
    case ChatTemplate::kR1:
      return "deepseek-r1";
    case ChatTemplate::kV31:
      return "deepseek-v3.1";
    case ChatTemplate::kOther:
      return "of no known family";
  }
  return "?";
}

absl::StatusOr<std::vector<ChatSegment>> RenderChat(ChatTemplate chat_template,
                                                    absl::Span<const ChatMessage> messages,
                                                    bool add_generation_prompt) {
  RETURN_IF_ERROR(CheckRoles(messages));
  switch (chat_template) {
    case ChatTemplate::kV3:
      return RenderV3(messages, add_generation_prompt);
    case ChatTemplate::kR1:
    case ChatTemplate::kV31:
    case ChatTemplate::kOther:
      break;
  }
  return absl::UnimplementedError(absl::StrCat("chat template ", Name(chat_template),
                                               " is not implemented, only ",
                                               Name(ChatTemplate::kV3)));
}

absl::StatusOr<std::vector<TokenId>> EncodeChat(const Tokenizer& tokenizer,
                                                absl::Span<const ChatSegment> segments) {
  std::vector<TokenId> ids;
  for (const ChatSegment& segment : segments) {
    if (segment.is_marker) {
      const std::optional<TokenId> id = tokenizer.AddedTokenId(segment.text);
      if (!id) {
        return absl::FailedPreconditionError(absl::StrCat(
            "the tokenizer has no token ", segment.text, ": the model has no chat format"));
      }
      ids.push_back(*id);
      continue;
    }
    ASSIGN_OR_RETURN(const std::vector<TokenId> text,
                     tokenizer.Encode(segment.text, Tokenizer::AddedTokens::kIgnore));
    ids.insert(ids.end(), text.begin(), text.end());
  }
  return ids;
}

}  // namespace moebius::model
