#pragma once

// Between the attention worker's records and its gRPC messages.

#include "attention_worker/generation.h"
#include "moebius/v1/generation.pb.h"
#include "moebius/v1/worker.pb.h"

namespace moebius::services {

// kNone, and kError (whose call ends with a status instead), are UNSPECIFIED.
inline v1::FinishReason ToProto(attention_worker::FinishReason reason) {
  switch (reason) {
    case attention_worker::FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case attention_worker::FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case attention_worker::FinishReason::kCancelled:
      return v1::FINISH_REASON_CANCELLED;
    case attention_worker::FinishReason::kDeadline:
      return v1::FINISH_REASON_DEADLINE;
    default:
      return v1::FINISH_REASON_UNSPECIFIED;
  }
}

inline v1::WorkerToken ToProto(const attention_worker::TokenEvent& event) {
  v1::WorkerToken token;
  token.set_token_index(event.index);
  token.set_has_token(event.token >= 0);
  token.set_token_id(event.token);
  token.set_logprob(event.logprob);
  token.set_row_digest(event.row_digest);
  token.set_finish_reason(ToProto(event.finish_reason));
  token.set_preemptions(event.preemptions);
  return token;
}

// Without a sink.
inline attention_worker::Submit ToSubmit(const v1::ResolvedRequest& request) {
  attention_worker::Submit submit;
  submit.request = RequestId(request.request());
  submit.prompt.assign(request.prompt().begin(), request.prompt().end());
  submit.generated.assign(request.generated().begin(), request.generated().end());
  submit.sampling = {request.temperature(), request.top_k(), request.top_p(), request.seed()};
  submit.max_tokens = request.max_tokens();
  submit.stop_strings.assign(request.stop().begin(), request.stop().end());
  submit.ignore_eos = request.ignore_eos();
  submit.deadline_ms = request.deadline_ms();
  return submit;
}

}  // namespace moebius::services
