#include "services/gateway/client_events.h"

#include <utility>

namespace moebius::services {

ClientEvents::ClientEvents(const ModelHost& host, std::string request_id, size_t prompt_tokens,
                           absl::Span<const TokenId> before)
    : request_id_(std::move(request_id)),
      prompt_tokens_(prompt_tokens),
      completion_tokens_(before.size()) {
  if (host.tokenizer == nullptr) return;
  decoder_ = std::make_unique<model::StreamDecoder>(*host.tokenizer, /*skip_special=*/true);
  for (const TokenId token : before) decoder_->Append(token);
}

void ClientEvents::NextWorker() {
  preemptions_before_ += preemptions_;
  preemptions_ = 0;
}

v1::GenerateEvent ClientEvents::Next(const v1::WorkerToken& token) {
  v1::GenerateEvent event;
  event.set_request_id(request_id_);
  event.set_token_index(token.token_index());
  event.set_has_token(token.has_token());
  event.set_finish_reason(token.finish_reason());
  preemptions_ = token.preemptions();
  if (token.has_token()) {
    ++completion_tokens_;
    event.set_token_id(token.token_id());
    event.set_logprob(token.logprob());
    event.set_row_digest(token.row_digest());
    if (decoder_ != nullptr) event.set_text(decoder_->Append(token.token_id()));
  }
  if (token.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
    if (decoder_ != nullptr) event.mutable_text()->append(decoder_->Finish());
    event.mutable_usage()->set_prompt_tokens(prompt_tokens_);
    event.mutable_usage()->set_completion_tokens(completion_tokens_);
    event.mutable_usage()->set_preemptions(preemptions_before_ + preemptions_);
  }
  return event;
}

}  // namespace moebius::services
