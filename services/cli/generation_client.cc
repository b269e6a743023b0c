#include "services/cli/generation_client.h"

#include <grpcpp/grpcpp.h>

#include <chrono>

#include "base/status_macros.h"
#include "services/attention/event_queue.h"
#include "services/common/finish_reason.h"
#include "services/common/grpc_status.h"
#include "services/gateway/request_check.h"

namespace moebius::services {
namespace {

RequestLimits LimitsOf(const ModelHost& host) {
  RequestLimits limits;
  limits.max_context = host.config.max_position_embeddings;
  limits.default_deadline_ms = 0;  // whoever waits is this process
  return limits;
}

// The gateway ends the request at its deadline and says so; this is for one that does not answer.
void SetDeadline(grpc::ClientContext& context, int64_t deadline_ms) {
  if (deadline_ms <= 0) return;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(deadline_ms) +
                       std::chrono::seconds(5));
}

}  // namespace

absl::StatusOr<std::unique_ptr<GenerationClient>> GenerationClient::Open(const ClientFlags& flags) {
  auto client = std::make_unique<GenerationClient>();
  if (!flags.address.empty()) {
    RETURN_IF_ERROR(CheckTlsFiles(flags.credentials));
    client->stub_ = v1::Generation::NewStub(MakeChannel(flags.address, flags.credentials));
    return client;
  }
  if (flags.model.empty())
    return absl::InvalidArgumentError("give --model DIR, or --address of a running cluster");
  ASSIGN_OR_RETURN(client->local_, LocalEngine::Open(flags.model, flags.local));
  return client;
}

absl::Status GenerationClient::Generate(
    const v1::GenerateRequest& request,
    const std::function<void(const v1::GenerateEvent&)>& on_event,
    const std::function<bool()>& stop) {
  if (local_ != nullptr) return GenerateLocally(request, on_event, stop);
  grpc::ClientContext context;
  SetDeadline(context, request.deadline_ms());
  auto reader = stub_->Generate(&context, request);
  v1::GenerateEvent event;
  while (reader->Read(&event)) {
    on_event(event);
    if (stop && stop()) context.TryCancel();
  }
  return FromGrpc(reader->Finish());
}

absl::Status GenerationClient::GenerateLocally(
    const v1::GenerateRequest& request,
    const std::function<void(const v1::GenerateEvent&)>& on_event,
    const std::function<bool()>& stop) {
  using attention_worker::FinishReason;
  using attention_worker::TokenEvent;
  const ModelHost& host = local_->host();
  ASSIGN_OR_RETURN(const v1::ResolvedRequest resolved,
                   ResolveGenerate(host, LimitsOf(host), request));
  attention_worker::Submit submit;
  submit.prompt.assign(resolved.prompt().begin(), resolved.prompt().end());
  submit.sampling = {resolved.temperature(), resolved.top_k(), resolved.top_p(), resolved.seed()};
  submit.max_tokens = resolved.max_tokens();
  submit.stop_strings.assign(resolved.stop().begin(), resolved.stop().end());
  submit.ignore_eos = resolved.ignore_eos();
  submit.deadline_ms = resolved.deadline_ms();
  std::unique_ptr<model::StreamDecoder> decoder;
  if (host.tokenizer != nullptr) {
    decoder = std::make_unique<model::StreamDecoder>(*host.tokenizer, /*skip_special=*/true);
  }
  uint64_t completion_tokens = 0;
  // The loop hands events over; text is decoded and shown by this thread.
  auto queue = std::make_shared<EventQueue<TokenEvent>>(resolved.max_tokens() + 2);
  std::thread shower([&] {
    while (true) {
      const std::optional<TokenEvent> token = queue->Pop(std::chrono::seconds(1));
      if (!token) continue;
      if (token->token < 0 && token->finish_reason == FinishReason::kError) return;
      v1::GenerateEvent event;
      event.set_request_id(request.request_id());
      event.set_token_index(token->index);
      event.set_has_token(token->token >= 0);
      if (token->token >= 0) {
        ++completion_tokens;
        event.set_token_id(token->token);
        event.set_logprob(token->logprob);
        event.set_row_digest(token->row_digest);
        if (decoder != nullptr) event.set_text(decoder->Append(token->token));
      }
      const bool last = token->finish_reason != FinishReason::kNone;
      if (last) {
        if (decoder != nullptr) event.mutable_text()->append(decoder->Finish());
        event.set_finish_reason(ToProto(token->finish_reason));
        event.mutable_usage()->set_prompt_tokens(static_cast<uint64_t>(resolved.prompt_size()));
        event.mutable_usage()->set_completion_tokens(completion_tokens);
        event.mutable_usage()->set_preemptions(token->preemptions);
      }
      on_event(event);
      if (last) return;
      if (stop && stop()) local_->Cancel(token->request);
    }
  });
  const absl::StatusOr<GenerationResult> result =
      local_->Generate(std::move(submit), [queue](const TokenEvent& event) { queue->Push(event); });
  if (!result.ok() || result->events.empty() ||
      result->events.back().finish_reason == FinishReason::kNone) {
    // The stream ended without a token that says so: an error, or an end that carries no token.
    TokenEvent end;
    end.finish_reason = result.ok()                                 ? result->finish_reason
                        : absl::IsDeadlineExceeded(result.status()) ? FinishReason::kDeadline
                                                                    : FinishReason::kError;
    end.token = -1;
    end.preemptions = result.ok() ? result->preemptions : 0;
    queue->Push(end);
  }
  shower.join();
  return result.status();
}

absl::StatusOr<v1::ScoreReply> GenerationClient::Score(const v1::ScoreRequest& request) {
  v1::ScoreReply reply;
  if (local_ == nullptr) {
    grpc::ClientContext context;
    SetDeadline(context, request.deadline_ms());
    RETURN_IF_ERROR(FromGrpc(stub_->Score(&context, request, &reply)));
    return reply;
  }
  const ModelHost& host = local_->host();
  ASSIGN_OR_RETURN(const v1::ResolvedScore resolved, ResolveScore(host, LimitsOf(host), request));
  ASSIGN_OR_RETURN(const std::vector<attention_worker::ScoreEvent> scores,
                   local_->Score({resolved.prompt().begin(), resolved.prompt().end()},
                                 static_cast<uint32_t>(resolved.top()), resolved.deadline_ms()));
  reply.set_request_id(request.request_id());
  for (const attention_worker::ScoreEvent& score : scores) {
    v1::ScorePosition* position = reply.add_positions();
    position->set_next_logprob(score.next_logprob);
    position->set_row_digest(score.row_digest);
    for (TokenId id : score.top_ids) position->add_top_ids(id);
    for (float logprob : score.top_logprobs) position->add_top_logprob(logprob);
  }
  return reply;
}

}  // namespace moebius::services
