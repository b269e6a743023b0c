#include "services/gateway/stream_relay.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "services/common/grpc_status.h"

namespace moebius::services {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// A worker ends a request at its deadline and says so. One that has stopped says nothing: then the
// call to it ends so much later, and with it the request's place here.
constexpr std::chrono::seconds kDeadlineGrace(2);

// Another arithmetic is better than none, but not than a worker that is being restarted, or whose
// death the controller has not noticed yet.
constexpr std::chrono::seconds kClassPatience(3);
// After a refusal (a full worker, one that drains) it is asked again, or another, so soon.
constexpr milliseconds kRefusedPause(50);

}  // namespace

// Ends with the client's call, at the client's gRPC deadline, when the request's own has passed and
// the worker does not answer, or when the worker has no beat.
class StreamRelay::Call {
 public:
  explicit Call(StreamRelay& relay)
      : relay_(relay),
        context_(grpc::ClientContext::FromServerContext(relay.client_)),
        watched_(relay.parts_.silence, [this] {
          silent_ = true;
          context_->TryCancel();
        }) {
    context_->set_deadline(std::chrono::system_clock::now() + milliseconds(relay.RemainingMs()) +
                           kDeadlineGrace);
  }
  grpc::ClientContext* context() { return context_.get(); }
  // The next message, which is a sign of life.
  template <typename Reader, typename Message>
  bool Read(Reader& reader, Message& message, Hold& hold, RequestJournal& journal) {
    watched_.Begin();
    const bool read = reader.Read(&message);
    watched_.End();
    if (!read) return false;
    hold.Answered();
    journal.TakenAboard();
    relay_.answered_ = true;
    return true;
  }
  template <typename Reader>
  absl::Status Finish(Reader& reader) {
    const grpc::Status status = reader.Finish();
    if (silent_) {
      ++relay_.parts_.counters.workers_silent;
      return absl::UnavailableError("the worker fell silent");
    }
    return FromGrpc(status);
  }

 private:
  StreamRelay& relay_;
  const std::unique_ptr<grpc::ClientContext> context_;
  std::atomic<bool> silent_{false};
  StallWatch::Stream watched_;  // last: it goes first, and with it the last use of the others
};

StreamRelay::StreamRelay(const RelayParts& parts, grpc::ServerContext& client,
                         std::string request_id, int64_t deadline_ms)
    : parts_(parts),
      client_(client),
      request_id_(std::move(request_id)),
      begin_(steady_clock::now()),
      deadline_(begin_ + milliseconds(deadline_ms)) {}

int64_t StreamRelay::RemainingMs() const {
  const auto left = std::chrono::ceil<milliseconds>(deadline_ - steady_clock::now());
  return std::max<int64_t>(left.count(), 1);
}

absl::Status StreamRelay::DeadlineStatus() const {
  return absl::DeadlineExceededError("deadline_ms: has passed");
}

grpc::Status StreamRelay::Run(RequestJournal& journal,
                              const std::function<absl::Status(Hold&)>& attempt) {
  const auto first_until = std::min(deadline_, begin_ + parts_.worker_wait);
  WorkerTable::Wish wish;
  wish.any_class_from = begin_ + kClassPatience;
  std::string last = "no attention worker is ready";
  while (true) {
    // Without a token there is nothing that another class could differ from.
    if (journal.generated().empty()) numerics_class_.clear();
    wish.numerics_class = numerics_class_;
    wish.suspect = journal.suspect();
    const absl::StatusOr<std::unique_ptr<Hold>> hold =
        parts_.workers.Take(wish, journal.aboard_once() ? deadline_ : first_until,
                            [this] { return client_.IsCancelled(); });
    if (!hold.ok()) {
      if (absl::IsCancelled(hold.status())) return ToGrpc(hold.status());
      if (steady_clock::now() >= deadline_) return ToGrpc(DeadlineStatus());
      client_.AddTrailingMetadata(kWaitedMetadata, "1");
      return ToGrpc(absl::UnavailableError(last));
    }
    if (numerics_class_.empty()) numerics_class_ = (*hold)->numerics_class();
    if (!inexact_ && (*hold)->numerics_class() != numerics_class_) {
      inexact_ = true;
      ++parts_.counters.requests_inexact;
      LOG_WARNING(absl::StrCat("request ", request_id_, ": no worker of class ", numerics_class_,
                               " is left, goes on as ", (*hold)->numerics_class()));
    }
    journal.BeginAttempt();
    answered_ = false;
    const absl::Status ended = attempt(**hold);
    if (ended.ok()) return grpc::Status::OK;
    if (journal.finished()) return ToGrpc(ended);
    if (client_gone_ || client_.IsCancelled()) return ToGrpc(absl::CancelledError("cancelled"));
    const absl::Status verdict = journal.AttemptEnded(ended);
    if (!verdict.ok()) {
      if (journal.deaths() == RequestJournal::kMostDeaths) {
        ++parts_.counters.requests_poisonous;
        LOG_ERROR(absl::StrCat("request ", request_id_, ": ", verdict.message()));
      }
      return ToGrpc(verdict);
    }
    const auto now = steady_clock::now();
    if (RequestJournal::IsRefusal(ended)) {
      // It is there: others need not be kept from it.
      wish.refused_by = (*hold)->node();
      wish.not_before = now + kRefusedPause;
    } else {
      (*hold)->Failed();
    }
    if (answered_) wish.any_class_from = now + kClassPatience;
    last = std::string(ended.message());
    LOG_INFO(absl::StrCat("request ", request_id_, ": attempt ", journal.attempts(), " ended (",
                          last, "), goes on behind ", journal.generated().size(), " tokens"));
  }
}

grpc::Status StreamRelay::Generate(v1::ResolvedRequest request, const v1::Resume& resume,
                                   grpc::ServerWriter<v1::GenerateEvent>& writer) {
  numerics_class_ = resume.numerics_class();
  inexact_ = resume.inexact();
  RequestJournal journal({request.generated().begin(), request.generated().end()});
  ClientEvents events(parts_.host, request_id_, static_cast<size_t>(request.prompt_size()),
                      journal.generated());
  const grpc::Status status = Run(
      journal, [&](Hold& hold) { return GenerateOnce(hold, journal, request, events, writer); });
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED && !journal.finished()) {
    // No worker could say it.
    v1::WorkerToken end;
    end.set_token_index(journal.generated().size());
    end.set_finish_reason(v1::FINISH_REASON_DEADLINE);
    (void)writer.Write(events.Next(end));
  }
  return status;
}

absl::Status StreamRelay::GenerateOnce(Hold& hold, RequestJournal& journal,
                                       v1::ResolvedRequest& request, ClientEvents& events,
                                       grpc::ServerWriter<v1::GenerateEvent>& writer) {
  request.set_request(parts_.next_request.fetch_add(1));
  request.set_deadline_ms(RemainingMs());
  request.mutable_generated()->Assign(journal.generated().begin(), journal.generated().end());
  events.NextWorker();
  StallWatch::Stream write(parts_.writes, [this] {
    ++parts_.counters.slow_clients_cut;
    LOG_WARNING(absl::StrCat("request ", request_id_, ": the client does not read, cut off"));
    client_.TryCancel();
  });
  Call call(*this);
  const auto reader = hold.stub().Generate(call.context(), request);
  v1::WorkerToken token;
  bool counted = journal.attempts() == 1;
  absl::Status disorder;
  while (call.Read(*reader, token, hold, journal)) {
    if (!counted) {
      counted = true;
      ++parts_.counters.requests_replayed;
      parts_.counters.tokens_replayed += journal.generated().size();
    }
    if (token.beat()) continue;
    const bool last = token.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
    disorder = journal.Record(token.token_index(), token.has_token() ? token.token_id() : -1, last);
    if (!disorder.ok()) break;
    if (token.has_token()) {
      hold.Cleared();
      ++parts_.counters.tokens_out;
    }
    v1::GenerateEvent event = events.Next(token);
    if (told_class_ != hold.numerics_class()) {
      told_class_ = hold.numerics_class();
      event.set_numerics_class(told_class_);
    }
    event.set_inexact(inexact_);
    write.Begin();
    client_gone_ = !writer.Write(event);
    write.End();
    if (client_gone_ || last) break;
  }
  // All is said, or nothing more is wanted: how the worker ends its call makes no difference.
  if (client_gone_ || journal.finished() || !disorder.ok()) call.context()->TryCancel();
  const absl::Status status = call.Finish(*reader);
  if (!disorder.ok()) return disorder;
  if (!journal.finished()) {
    return status.ok() ? absl::UnavailableError("the stream broke off") : status;
  }
  switch (token.finish_reason()) {
    case v1::FINISH_REASON_DEADLINE:
      return DeadlineStatus();
    case v1::FINISH_REASON_CANCELLED:
      return absl::CancelledError("cancelled");
    default:
      return absl::OkStatus();
  }
}

grpc::Status StreamRelay::Score(v1::ResolvedScore request, v1::ScoreReply& reply) {
  RequestJournal journal;
  int most_positions = 0;
  return Run(journal,
             [&](Hold& hold) { return ScoreOnce(hold, journal, request, reply, most_positions); });
}

absl::Status StreamRelay::ScoreOnce(Hold& hold, RequestJournal& journal, v1::ResolvedScore& request,
                                    v1::ScoreReply& reply, int& most_positions) {
  request.set_request(parts_.next_request.fetch_add(1));
  request.set_deadline_ms(RemainingMs());
  reply.clear_positions();
  Call call(*this);
  const auto reader = hold.stub().Score(call.context(), request);
  v1::WorkerScore score;
  bool counted = journal.attempts() == 1;
  while (call.Read(*reader, score, hold, journal)) {
    if (!counted) ++parts_.counters.requests_replayed;
    counted = true;
    if (score.beat()) continue;
    *reply.add_positions() = std::move(*score.mutable_position());
    if (reply.positions_size() > most_positions) {
      most_positions = reply.positions_size();
      journal.Progressed();
      hold.Cleared();
    }
  }
  const absl::Status status = call.Finish(*reader);
  if (!status.ok() || reply.positions_size() == request.prompt_size()) return status;
  return absl::UnavailableError("the stream broke off");
}

}  // namespace moebius::services
