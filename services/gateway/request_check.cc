#include "services/gateway/request_check.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/chat_template.h"

namespace moebius::services {
namespace {

constexpr int kMaxStops = 8;
constexpr size_t kMaxStopBytes = 256;
constexpr size_t kMaxTextBytes = 8 << 20;

absl::Status CheckModel(const ModelHost& host, const std::string& model) {
  if (model.empty() || model == host.id) return absl::OkStatus();
  // Status messages travel in HTTP/2 headers, which have a limit and hold no control characters.
  constexpr size_t kEchoed = 64;
  return absl::NotFoundError(absl::StrCat("model: '", absl::CEscape(model.substr(0, kEchoed)),
                                          model.size() > kEchoed ? "..." : "",
                                          "' is not served; this is '", host.id, "'"));
}

absl::Status CheckText(const ModelHost& host, const std::string& text, absl::string_view field) {
  if (text.empty()) return absl::InvalidArgumentError(absl::StrCat(field, ": is empty"));
  if (text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": ", text.size(), " bytes, limit ", kMaxTextBytes));
  }
  if (host.tokenizer == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": this model has no tokenizer; send token_ids"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TokenId>> EncodeText(const ModelHost& host, const std::string& text,
                                                absl::string_view field, bool with_bos) {
  RETURN_IF_ERROR(CheckText(host, text, field));
  // What a user writes is text, even where it spells a control token.
  ASSIGN_OR_RETURN(std::vector<TokenId> ids,
                   host.tokenizer->Encode(text, model::Tokenizer::AddedTokens::kIgnore));
  if (with_bos && host.config.bos_token_id) ids.insert(ids.begin(), *host.config.bos_token_id);
  return ids;
}

absl::StatusOr<std::vector<TokenId>> EncodeChat(const ModelHost& host,
                                                const v1::ChatMessages& chat) {
  if (chat.messages_size() == 0) return absl::InvalidArgumentError("chat.messages: is empty");
  std::vector<model::ChatMessage> messages;
  size_t bytes = 0;
  for (const v1::ChatMessage& message : chat.messages()) {
    bytes += message.content().size();
    messages.push_back({message.role(), message.content()});
  }
  if (bytes > kMaxTextBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("chat.messages: ", bytes, " bytes, limit ", kMaxTextBytes));
  }
  if (host.tokenizer == nullptr) {
    return absl::InvalidArgumentError("chat: this model has no tokenizer; send token_ids");
  }
  ASSIGN_OR_RETURN(const std::vector<model::ChatSegment> segments,
                   model::RenderChat(host.chat_template, messages, /*add_generation_prompt=*/true));
  return model::EncodeChat(*host.tokenizer, segments);
}

// It goes to logs and back to clients: no line breaks, no terminal commands.
absl::Status CheckPrintable(const std::string& text, absl::string_view field) {
  if (text.size() > 128) {
    return absl::InvalidArgumentError(absl::StrCat(field, ": longer than 128 bytes"));
  }
  const auto bad =
      std::find_if(text.begin(), text.end(), [](char c) { return c < 0x20 || c > 0x7e; });
  if (bad == text.end()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": byte ", bad - text.begin(), " is not printable ASCII"));
}

// With the default put in.
absl::StatusOr<int64_t> ResolveDeadline(int64_t deadline_ms, const RequestLimits& limits) {
  if (deadline_ms < 0 || deadline_ms > limits.max_deadline_ms) {
    return absl::InvalidArgumentError(
        absl::StrCat("deadline_ms: ", deadline_ms, " is not in [0, ", limits.max_deadline_ms, "]"));
  }
  return deadline_ms == 0 ? limits.default_deadline_ms : deadline_ms;
}

absl::Status CheckIds(const ModelHost& host, const google::protobuf::RepeatedField<int32_t>& ids,
                      absl::string_view field) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= host.config.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          field, "[", i, "]: ", ids[i], " is not in [0, ", host.config.vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPromptIds(const ModelHost& host,
                            const google::protobuf::RepeatedField<int32_t>& ids) {
  if (ids.empty()) return absl::InvalidArgumentError("token_ids: is empty");
  return CheckIds(host, ids, "token_ids");
}

// What the client says it has, against the request as it is resolved otherwise.
absl::Status CheckResume(const ModelHost& host, const v1::ResolvedRequest& resolved,
                         const v1::Resume& resume) {
  RETURN_IF_ERROR(CheckIds(host, resume.token_ids(), "resume.token_ids"));
  if (static_cast<uint64_t>(resume.token_ids_size()) > resolved.max_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat("resume.token_ids: ", resume.token_ids_size(),
                                                   " tokens, max_tokens allows ",
                                                   resolved.max_tokens()));
  }
  RETURN_IF_ERROR(CheckPrintable(resume.numerics_class(), "resume.numerics_class"));
  const std::string model = absl::StrCat(model::ToHex(host.manifest.digest), "/");
  if (!resume.numerics_class().empty() && !absl::StartsWith(resume.numerics_class(), model)) {
    return absl::FailedPreconditionError(
        "resume.numerics_class: the stream began with another model than this one");
  }
  return absl::OkStatus();
}

absl::Status CheckLength(size_t prompt, const RequestLimits& limits, absl::string_view field) {
  if (static_cast<int64_t>(prompt) > limits.max_context) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": ", prompt, " tokens, the context holds ", limits.max_context));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<v1::ResolvedRequest> ResolveGenerate(const ModelHost& host,
                                                    const RequestLimits& limits,
                                                    const v1::GenerateRequest& request) {
  RETURN_IF_ERROR(CheckModel(host, request.model()));
  RETURN_IF_ERROR(CheckPrintable(request.request_id(), "request_id"));
  if (request.max_tokens() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens: ", request.max_tokens(), " is negative"));
  }
  if (!std::isfinite(request.temperature()) || request.temperature() < 0 ||
      request.temperature() > 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature: ", request.temperature(), " is not in [0, 2]"));
  }
  if (request.top_k() < 0)
    return absl::InvalidArgumentError(absl::StrCat("top_k: ", request.top_k(), " is negative"));
  if (!std::isfinite(request.top_p()) || request.top_p() < 0 || request.top_p() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_p: ", request.top_p(), " is not in (0, 1]"));
  }
  if (request.stop_size() > kMaxStops) {
    return absl::InvalidArgumentError(
        absl::StrCat("stop: ", request.stop_size(), " strings, limit ", kMaxStops));
  }
  for (int i = 0; i < request.stop_size(); ++i) {
    if (request.stop(i).empty() || request.stop(i).size() > kMaxStopBytes) {
      return absl::InvalidArgumentError(absl::StrCat("stop[", i, "]: ", request.stop(i).size(),
                                                     " bytes, allowed 1 to ", kMaxStopBytes));
    }
  }
  if (request.stop_size() > 0 && host.tokenizer == nullptr) {
    return absl::InvalidArgumentError("stop: this model has no tokenizer");
  }
  ASSIGN_OR_RETURN(const int64_t deadline_ms, ResolveDeadline(request.deadline_ms(), limits));
  v1::ResolvedRequest resolved;
  std::string field;
  switch (request.input_case()) {
    case v1::GenerateRequest::kText: {
      field = "text";
      ASSIGN_OR_RETURN(const std::vector<TokenId> ids,
                       EncodeText(host, request.text(), field, /*with_bos=*/true));
      resolved.mutable_prompt()->Add(ids.begin(), ids.end());
      break;
    }
    case v1::GenerateRequest::kChat: {
      field = "chat.messages";
      ASSIGN_OR_RETURN(const std::vector<TokenId> ids, EncodeChat(host, request.chat()));
      resolved.mutable_prompt()->Add(ids.begin(), ids.end());
      break;
    }
    case v1::GenerateRequest::kTokenIds:
      field = "token_ids";
      RETURN_IF_ERROR(CheckPromptIds(host, request.token_ids().ids()));
      *resolved.mutable_prompt() = request.token_ids().ids();
      break;
    case v1::GenerateRequest::INPUT_NOT_SET:
      return absl::InvalidArgumentError("input: one of text, chat and token_ids must be set");
  }
  RETURN_IF_ERROR(CheckLength(static_cast<size_t>(resolved.prompt_size()), limits, field));
  const int64_t room = limits.max_context - resolved.prompt_size();
  const int64_t wanted =
      request.max_tokens() == 0 ? limits.default_max_tokens : request.max_tokens();
  if (request.max_tokens() > limits.max_context) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens: ", request.max_tokens(),
                                                   ", the context holds ", limits.max_context));
  }
  if (room < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": ", resolved.prompt_size(), " tokens leave no room for an answer"));
  }
  resolved.set_max_tokens(static_cast<uint64_t>(std::min(wanted, room)));
  resolved.set_temperature(request.temperature());
  resolved.set_top_k(request.top_k());
  resolved.set_top_p(request.top_p() == 0 ? 1.0f : request.top_p());
  resolved.set_seed(request.seed());
  *resolved.mutable_stop() = request.stop();
  resolved.set_ignore_eos(request.ignore_eos());
  resolved.set_deadline_ms(deadline_ms);
  if (request.has_resume()) {
    RETURN_IF_ERROR(CheckResume(host, resolved, request.resume()));
    *resolved.mutable_generated() = request.resume().token_ids();
  }
  return resolved;
}

absl::StatusOr<v1::ResolvedScore> ResolveScore(const ModelHost& host, const RequestLimits& limits,
                                               const v1::ScoreRequest& request) {
  RETURN_IF_ERROR(CheckModel(host, request.model()));
  RETURN_IF_ERROR(CheckPrintable(request.request_id(), "request_id"));
  ASSIGN_OR_RETURN(const int64_t deadline_ms, ResolveDeadline(request.deadline_ms(), limits));
  RETURN_IF_ERROR(CheckPromptIds(host, request.token_ids().ids()));
  RETURN_IF_ERROR(
      CheckLength(static_cast<size_t>(request.token_ids().ids_size()), limits, "token_ids"));
  if (request.top() < 0 || request.top() > 20) {
    return absl::InvalidArgumentError(absl::StrCat("top: ", request.top(), " is not in [0, 20]"));
  }
  v1::ResolvedScore resolved;
  *resolved.mutable_prompt() = request.token_ids().ids();
  resolved.set_top(request.top());
  resolved.set_deadline_ms(deadline_ms);
  return resolved;
}

absl::StatusOr<std::vector<TokenId>> ResolveTokenize(const ModelHost& host,
                                                     const v1::TokenizeRequest& request) {
  RETURN_IF_ERROR(CheckModel(host, request.model()));
  switch (request.input_case()) {
    case v1::TokenizeRequest::kText:
      return EncodeText(host, request.text(), "text", /*with_bos=*/false);
    case v1::TokenizeRequest::kChat:
      return EncodeChat(host, request.chat());
    case v1::TokenizeRequest::INPUT_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("input: one of text and chat must be set");
}

}  // namespace moebius::services
