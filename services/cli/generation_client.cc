#include "services/cli/generation_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "services/attention/event_queue.h"
#include "services/common/grpc_status.h"
#include "services/common/worker_messages.h"
#include "services/gateway/client_events.h"
#include "services/gateway/request_check.h"

namespace moebius::services {
namespace {

RequestLimits LimitsOf(const ModelHost& host) {
  RequestLimits limits;
  limits.max_context = host.config.max_position_embeddings;
  limits.default_deadline_ms = 0;  // whoever waits is this process
  return limits;
}

// How long to wait for a gateway to come back before asking whether to go on waiting.
constexpr std::chrono::milliseconds kConnectPatience(200);
constexpr std::chrono::milliseconds kFirstConnection(500);
constexpr std::chrono::seconds kLongerThanConnecting(6);

// Whether, and when, to make a call again whose gateway went away.
class Reconnection {
 public:
  // `window`: how long to try since a gateway was last there; 0: not at all. `deadline_ms` of the
  // request; 0: none.
  Reconnection(grpc::Channel& channel, std::chrono::seconds window, int64_t deadline_ms)
      : channel_(channel), window_(window), deadline_ms_(deadline_ms) {
    // Where no gateway is, the first call says so.
    seen_ = channel.WaitForConnected(std::chrono::system_clock::now() + kFirstConnection);
  }

  void BeginCall() { call_began_ = steady_clock::now(); }
  void Contact() {
    seen_ = true;
    lost_ = false;
    back_off_ = std::chrono::milliseconds(0);
  }
  // What is left of the deadline; 0: there is none.
  int64_t RemainingMs() const {
    if (deadline_ms_ <= 0) return 0;
    return std::max<int64_t>(deadline_ms_ - Spent().count(), 1);
  }

  // The call has ended with `status`. True after a pause, if it is worth making again. `begun`: the
  // stream has tokens, so the gateways owe the rest of it.
  bool Again(const absl::Status& status, const grpc::ClientContext& context, bool begun) {
    const bool waited = context.GetServerTrailingMetadata().count(kWaitedMetadata) > 0;
    const bool worth = (absl::IsUnavailable(status) && (begun || !waited)) ||
                       (absl::IsResourceExhausted(status) && begun);
    if (!seen_ || !worth || window_.count() == 0) return false;
    if (deadline_ms_ > 0 && Spent().count() >= deadline_ms_) return false;
    const auto now = steady_clock::now();
    // One that lasted had somebody at the other end.
    if (!lost_ || now - call_began_ > kLongerThanConnecting) lost_since_ = now;
    lost_ = true;
    if (now - lost_since_ > window_) return false;
    // A channel moves on only while somebody waits for it. A gateway that is there and refuses (it
    // drains) is not asked without a pause, nor by all clients in step.
    if (channel_.WaitForConnected(std::chrono::system_clock::now() + kConnectPatience)) {
      std::this_thread::sleep_for(back_off_ * (dice_() % 100) / 100);
    }
    back_off_ = std::clamp(back_off_ * 2, std::chrono::milliseconds(20), kConnectPatience);
    return true;
  }

 private:
  using steady_clock = std::chrono::steady_clock;
  std::chrono::milliseconds Spent() const {
    return std::chrono::duration_cast<std::chrono::milliseconds>(steady_clock::now() - began_);
  }

  grpc::Channel& channel_;
  const std::chrono::seconds window_;
  const int64_t deadline_ms_;
  const steady_clock::time_point began_ = steady_clock::now();
  steady_clock::time_point call_began_;
  bool seen_;
  bool lost_ = false;
  steady_clock::time_point lost_since_;
  std::chrono::milliseconds back_off_{0};
  std::minstd_rand dice_{std::random_device{}()};
};

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
    client->reconnect_ = flags.reconnect;
    client->channel_ = MakeChannel(flags.address, flags.credentials);
    client->stub_ = v1::Generation::NewStub(client->channel_);
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
  v1::GenerateRequest present = request;
  v1::FinishReason finish = v1::FINISH_REASON_UNSPECIFIED;
  Reconnection reconnection(*channel_, reconnect_, request.deadline_ms());
  while (true) {
    grpc::ClientContext context;
    present.set_deadline_ms(reconnection.RemainingMs());
    SetDeadline(context, present.deadline_ms());
    reconnection.BeginCall();
    auto reader = stub_->Generate(&context, present);
    v1::GenerateEvent event;
    bool stopped = false;
    bool disorder = false;
    while (!disorder && reader->Read(&event)) {
      reconnection.Contact();
      v1::Resume& resume = *present.mutable_resume();
      // A gateway that does not know how to go on begins anew: nothing is shown twice.
      disorder = event.token_index() != static_cast<uint64_t>(resume.token_ids_size());
      if (disorder) break;
      if (event.has_token()) resume.add_token_ids(event.token_id());
      if (resume.numerics_class().empty()) resume.set_numerics_class(event.numerics_class());
      resume.set_inexact(resume.inexact() || event.inexact());
      finish = event.finish_reason();
      on_event(event);
      stopped = stop && stop();
      if (stopped) context.TryCancel();
    }
    if (disorder) {
      context.TryCancel();
      (void)reader->Finish();
      return absl::DataLossError(absl::StrCat("token_index: ", event.token_index(),
                                              " from the gateway, ",
                                              present.resume().token_ids_size(), " is the next"));
    }
    const absl::Status status = FromGrpc(reader->Finish());
    // All is said: what became of the gateway since makes no difference.
    if (finish == v1::FINISH_REASON_STOP || finish == v1::FINISH_REASON_LENGTH) {
      return absl::OkStatus();
    }
    if (finish != v1::FINISH_REASON_UNSPECIFIED) return status;
    const bool begun = present.resume().token_ids_size() > 0;
    if (stopped || !reconnection.Again(status, context, begun)) return status;
    if (stop && stop()) return absl::CancelledError("cancelled");
  }
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
  const std::vector<TokenId> before(resolved.generated().begin(), resolved.generated().end());
  ClientEvents events(host, request.request_id(), static_cast<size_t>(resolved.prompt_size()),
                      before);
  // The loop hands events over; text is decoded and shown by this thread.
  auto queue = std::make_shared<EventQueue<TokenEvent>>(resolved.max_tokens() + 2);
  std::thread shower([&] {
    while (true) {
      const std::optional<TokenEvent> token = queue->Pop(std::chrono::seconds(1));
      if (!token) continue;
      if (token->token < 0 && token->finish_reason == FinishReason::kError) return;
      on_event(events.Next(ToProto(*token)));
      if (token->finish_reason != FinishReason::kNone) return;
      if (stop && stop()) local_->Cancel(token->request);
    }
  });
  const absl::StatusOr<GenerationResult> result = local_->Generate(
      ToSubmit(resolved), [queue](const TokenEvent& event) { queue->Push(event); });
  if (!result.ok() || result->events.empty() ||
      result->events.back().finish_reason == FinishReason::kNone) {
    // The stream ended without a token that says so: an error, or an end that carries no token.
    TokenEvent end;
    end.finish_reason = result.ok()                                 ? result->finish_reason
                        : absl::IsDeadlineExceeded(result.status()) ? FinishReason::kDeadline
                                                                    : FinishReason::kError;
    end.token = -1;
    end.index = before.size() + (result.ok() ? result->events.size() : 0);
    end.preemptions = result.ok() ? result->preemptions : 0;
    queue->Push(end);
  }
  shower.join();
  return result.status();
}

absl::StatusOr<v1::ScoreReply> GenerationClient::Score(const v1::ScoreRequest& request) {
  v1::ScoreReply reply;
  if (local_ == nullptr) {
    // It may be asked as often as one likes.
    v1::ScoreRequest present = request;
    Reconnection reconnection(*channel_, reconnect_, request.deadline_ms());
    while (true) {
      grpc::ClientContext context;
      present.set_deadline_ms(reconnection.RemainingMs());
      SetDeadline(context, present.deadline_ms());
      reconnection.BeginCall();
      const absl::Status status = FromGrpc(stub_->Score(&context, present, &reply));
      if (status.ok()) return reply;
      if (!reconnection.Again(status, context, /*begun=*/false)) return status;
    }
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
