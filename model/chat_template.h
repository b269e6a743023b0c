#pragma once

// Chat messages to a prompt, as code rather than as a template language. The result is a list of
// segments, not a string: markers are control tokens by their exact content, everything else is
// text to be encoded with added-token matching off. So a message that spells out a marker stays
// text and cannot end a turn, forge a role or start a tool call.
//
// Pure functions.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "model/tokenizer.h"

namespace moebius::model {

// One per published template; model/chat_template_choice.h tells which. kV3 is implemented; the
// others answer UNIMPLEMENTED by name, since serving a model with a neighbour's template works just
// well enough to hide the mistake.
enum class ChatTemplate : uint8_t {
  kV3,     // bos S (User u Assistant a eos)*, generation prompt: Assistant
  kR1,     // as V3, prompt "Assistant <think>\n", reasoning cut from stored turns
  kV31,    // thinking switch, "Assistant </think>" before stored turns
  kOther,  // none of these
};
const char* Name(ChatTemplate chat_template);

// Control tokens of the DeepSeek tokenizers (U+FF5C bars, U+2581 word joiners).
inline constexpr char kBosMarker[] = "<｜begin▁of▁sentence｜>";
inline constexpr char kEosMarker[] = "<｜end▁of▁sentence｜>";
inline constexpr char kUserMarker[] = "<｜User｜>";
inline constexpr char kAssistantMarker[] = "<｜Assistant｜>";

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

struct ChatSegment {
  bool is_marker = false;
  std::string text;  // a marker's exact content, or message text (never empty)
  friend bool operator==(const ChatSegment&, const ChatSegment&) = default;
};

// Renders a conversation. System messages, wherever they stand, are joined by two newlines and put
// first. With add_generation_prompt the result ends where the assistant's next answer begins.
// Errors: INVALID_ARGUMENT (no messages, unknown role; names messages[i]), UNIMPLEMENTED (another
// template, or the role "tool").
absl::StatusOr<std::vector<ChatSegment>> RenderChat(ChatTemplate chat_template,
                                                    absl::Span<const ChatMessage> messages,
                                                    bool add_generation_prompt);

// Token ids of rendered segments. FAILED_PRECONDITION names a marker that the tokenizer lacks: such
// a model has no chat format of this kind.
absl::StatusOr<std::vector<TokenId>> EncodeChat(const Tokenizer& tokenizer,
                                                absl::Span<const ChatSegment> segments);

}  // namespace moebius::model
