#include "attention_worker/attention_actor.h"

#include <algorithm>
#include <any>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention_worker/attention_counters.h"
#include "attention_worker/kv_block_pool.h"
#include "attention_worker/layer_compute.h"
#include "attention_worker/request_check.h"
#include "attention_worker/router_link.h"
#include "attention_worker/scheduler.h"
#include "attention_worker/step_batch.h"
#include "base/check.h"
#include "model/config.h"
#include "model/tokenizer.h"

namespace moebius::attention_worker {
namespace {

// Tags of compute work and of timers.
constexpr uint64_t kLayersDone = 1;
constexpr uint64_t kSharedDone = 2;
constexpr uint64_t kWatchdogTimer = 1;
constexpr uint64_t kDeadlineTimer = 2;

int64_t ContextLimit(const model::ModelConfig& config, const AttentionOptions& options) {
  return options.max_context > 0 ? options.max_context : config.max_position_embeddings;
}

}  // namespace

class AttentionActor::Impl {
 public:
  Impl(const AttentionModel& model, const AttentionOptions& options);

  void Start(runtime::Context& context) { link_.Start(context); }
  void Receive(runtime::Message& message, runtime::Context& context);
  AttentionCounters counters() const { return counters_.Snapshot(); }

 private:
  void OnPosted(std::any& body, runtime::Context& context);
  void OnComputeDone(const runtime::ComputeDone& done, runtime::Context& context);

  // Requests.
  void Accept(Submit request, runtime::Context& context);
  void Refuse(const Submit& request, absl::Status status);
  // With an event that has a reason and no token.
  void EndAtOnce(const Submit& request, FinishReason reason);
  void EndEarly(Sequence* sequence, FinishReason reason, absl::Status status,
                runtime::Context& context);
  void Finish(Sequence* sequence, runtime::Context& context);
  void CheckDrained();

  // Steps.
  void StartStep(runtime::Context& context);
  void SubmitLayers(runtime::Context& context);
  void ContinueIfRouted(runtime::Context& context);
  void FinishStep(runtime::Context& context);
  void EmitToken(Sequence* sequence, int32_t head, runtime::Context& context);
  void EmitScores(Sequence* sequence, int32_t begin, int32_t end, runtime::Context& context);
  void FailBackend(const absl::Status& status, runtime::Context& context);
  bool EndsWithStop(Sequence& sequence, TokenId token);
  void PublishCounters();

  const model::Tokenizer* const tokenizer_;
  const RequestLimits limits_;
  const std::vector<TokenId> eos_token_ids_;
  const std::function<void(const absl::Status&)> on_backend_failure_;
  KvBlockPool pool_;
  Scheduler scheduler_;
  StepBatch batch_;
  LayerCompute compute_;
  RouterLink link_;
  LiveCounters counters_;

  StepId step_;
  std::vector<StepItem> items_;
  bool step_in_flight_ = false;
  bool layers_running_ = false;
  bool shared_running_ = false;
  absl::Status backend_status_;

  bool draining_ = false;
  std::vector<std::function<void()>> on_drained_;
  ScoreEvent score_event_;  // reused: its vectors keep their capacity
};

AttentionActor::Impl::Impl(const AttentionModel& model, const AttentionOptions& options)
    : tokenizer_(model.tokenizer),
      limits_{model.config->vocab_size, ContextLimit(*model.config, options), options.num_blocks,
              static_cast<uint32_t>(options.max_top_n), model.tokenizer != nullptr},
      eos_token_ids_(options.eos_token_ids.empty() ? model.config->eos_token_id
                                                   : options.eos_token_ids),
      on_backend_failure_(options.on_backend_failure),
      pool_(options.num_blocks, model.config->num_hidden_layers, model.config->latent_dim()),
      scheduler_({options.max_step_tokens, options.prefill_chunk, options.max_running,
                  options.max_waiting},
                 &pool_),
      batch_(options.max_step_tokens, static_cast<uint32_t>(options.max_top_n)),
      compute_(model, options, limits_.max_context, &pool_),
      link_(options, model.config->hidden_size, kWatchdogTimer) {
  items_.reserve(options.max_running);
  score_event_.top_ids.reserve(options.max_top_n);
  score_event_.top_logprobs.reserve(options.max_top_n);
  PublishCounters();
}

void AttentionActor::Impl::Receive(runtime::Message& message, runtime::Context& context) {
  if (auto* received = std::get_if<runtime::FrameReceived>(&message)) {
    if (link_.OnFrame(*received)) ContinueIfRouted(context);
  } else if (auto* done = std::get_if<runtime::ComputeDone>(&message)) {
    OnComputeDone(*done, context);
  } else if (auto* posted = std::get_if<runtime::Posted>(&message)) {
    OnPosted(posted->body, context);
  } else if (auto* timer = std::get_if<runtime::TimerFired>(&message)) {
    if (timer->tag == kWatchdogTimer) {
      link_.OnWatchdog(context);
    } else if (Sequence* sequence = scheduler_.FindByTimer(timer->timer)) {
      sequence->deadline_timer = 0;
      EndEarly(sequence, FinishReason::kDeadline,
               absl::DeadlineExceededError("deadline_ms: has passed"), context);
    }
  } else if (auto* change = std::get_if<runtime::LinkChanged>(&message)) {
    link_.OnLink(*change, context);
  } else if (std::get_if<runtime::Writable>(&message) != nullptr) {
    link_.OnWritable(context);
  }
  StartStep(context);
  CheckDrained();
  PublishCounters();
}

void AttentionActor::Impl::OnPosted(std::any& body, runtime::Context& context) {
  if (auto* submit = std::any_cast<Submit>(&body)) {
    Accept(std::move(*submit), context);
  } else if (auto* cancel = std::any_cast<Cancel>(&body)) {
    if (Sequence* sequence = scheduler_.Find(cancel->request)) {
      EndEarly(sequence, FinishReason::kCancelled, absl::CancelledError("cancelled"), context);
    }
  } else if (auto* ping = std::any_cast<Ping>(&body)) {
    if (ping->on_pong) ping->on_pong();
  } else if (auto* drain = std::any_cast<Drain>(&body)) {
    draining_ = true;
    if (drain->on_drained) on_drained_.push_back(std::move(drain->on_drained));
  } else if (auto* update = std::any_cast<RouterUpdate>(&body)) {
    link_.Use(update->router, update->peer, context);
  }
}

// ---- Requests ----

void AttentionActor::Impl::Refuse(const Submit& request, absl::Status status) {
  ++counters_.local.refused;
  if (!request.on_token) return;
  TokenEvent event;
  event.request = request.request;
  event.finish_reason = FinishReason::kError;
  event.status = std::move(status);
  request.on_token(event);
}

void AttentionActor::Impl::EndAtOnce(const Submit& request, FinishReason reason) {
  ++counters_.local.requests;
  TokenEvent event;
  event.request = request.request;
  event.index = request.generated.size();
  event.finish_reason = reason;
  if (request.on_token) request.on_token(event);
}

void AttentionActor::Impl::Accept(Submit request, runtime::Context& context) {
  // ABORTED: ask another worker, this one is going.
  if (!backend_status_.ok()) {
    return Refuse(request, absl::AbortedError(
                               absl::StrCat("this worker is going: ", backend_status_.message())));
  }
  if (draining_) return Refuse(request, absl::AbortedError("this worker is draining"));
  if (absl::Status status = CheckRequest(request, limits_); !status.ok()) {
    return Refuse(request, std::move(status));
  }
  if (scheduler_.Find(request.request) != nullptr) {
    return Refuse(request, absl::AlreadyExistsError("request: this id is aboard already"));
  }
  if (!request.on_score && request.max_tokens == 0) {
    return EndAtOnce(request, FinishReason::kLength);
  }

  auto sequence = std::make_unique<Sequence>();
  sequence->id = request.request;
  sequence->max_length = FinalLength(request, limits_);
  sequence->prompt_length = static_cast<int64_t>(request.prompt.size());
  // Everything the sequence will ever need, so that its steps allocate nothing.
  sequence->tokens.reserve(sequence->max_length);
  sequence->tokens.assign(request.prompt.begin(), request.prompt.end());
  sequence->tokens.insert(sequence->tokens.end(), request.generated.begin(),
                          request.generated.end());
  sequence->block_table.reserve(BlocksForTokens(sequence->max_length));
  sequence->sampling = request.sampling;
  sequence->ignore_eos = request.ignore_eos;
  sequence->is_score = static_cast<bool>(request.on_score);
  sequence->top_n = request.top_n;
  sequence->on_token = std::move(request.on_token);
  sequence->on_score = std::move(request.on_score);
  if (!request.stop_strings.empty()) {
    sequence->stop = StopMatcher(std::move(request.stop_strings));
  }
  // Whoever asks may have lost the last event: then there is nothing left to do but to repeat it.
  // The matcher sees every token, so that a stop string may lie across the border.
  FinishReason ended = FinishReason::kNone;
  for (const TokenId token : request.generated) {
    if (EndsWithStop(*sequence, token)) ended = FinishReason::kStop;
  }
  if (ended == FinishReason::kNone && !request.generated.empty() &&
      sequence->length() >= sequence->max_length) {
    ended = FinishReason::kLength;
  }
  if (ended != FinishReason::kNone) {
    request.on_token = std::move(sequence->on_token);
    return EndAtOnce(request, ended);
  }
  Sequence* accepted = sequence.get();
  if (!scheduler_.Enqueue(sequence)) {
    request.on_token = std::move(accepted->on_token);
    return Refuse(request, absl::ResourceExhaustedError("too many requests are waiting"));
  }
  ++counters_.local.requests;
  if (request.deadline_ms > 0) {
    // Beyond a year a deadline is none; the cut keeps the sum of nanoseconds in range.
    const int64_t ms = std::min<int64_t>(request.deadline_ms, int64_t{365} * 24 * 3600 * 1000);
    accepted->deadline_timer = context.SetTimer(std::chrono::milliseconds(ms), kDeadlineTimer);
  }
}

void AttentionActor::Impl::EndEarly(Sequence* sequence, FinishReason reason, absl::Status status,
                                    runtime::Context& context) {
  // While layers are being computed nothing is with the router.
  if (step_in_flight_ && !layers_running_ && !link_.answered()) {
    for (size_t i = 0; i < items_.size(); ++i) {
      if (items_[i].sequence == sequence) {
        link_.Abandon(batch_.first_row[i], batch_.first_row[i + 1], context);
      }
    }
  }
  TokenEvent event;
  event.request = sequence->id;
  event.index = sequence->generated();
  event.finish_reason = reason;
  event.preemptions = sequence->preemptions;
  event.status = std::move(status);
  if (sequence->on_token) sequence->on_token(event);
  Finish(sequence, context);
}

void AttentionActor::Impl::Finish(Sequence* sequence, runtime::Context& context) {
  if (sequence->deadline_timer != 0) context.CancelTimer(sequence->deadline_timer);
  scheduler_.Finish(sequence);
}

void AttentionActor::Impl::CheckDrained() {
  if (!draining_ || !scheduler_.empty()) return;
  std::vector<std::function<void()>> callbacks = std::move(on_drained_);
  on_drained_.clear();
  for (auto& callback : callbacks) callback();
}

// ---- Steps ----

void AttentionActor::Impl::StartStep(runtime::Context& context) {
  if (step_in_flight_) return;
  scheduler_.Reap();
  if (!backend_status_.ok() || scheduler_.empty()) return;
  scheduler_.Plan(items_);
  batch_.Build(items_);
  step_ = StepId(step_.value() + 1);
  step_in_flight_ = true;
  compute_.Begin(&batch_);
  SubmitLayers(context);
}

void AttentionActor::Impl::SubmitLayers(runtime::Context& context) {
  layers_running_ = true;
  context.Submit([this] { return compute_.RunLayers(); }, kLayersDone);
}

void AttentionActor::Impl::OnComputeDone(const runtime::ComputeDone& done,
                                         runtime::Context& context) {
  if (done.tag == kSharedDone) {
    shared_running_ = false;
  } else {
    layers_running_ = false;
    link_.Reset();  // the routed sums have been consumed
  }
  if (!done.status.ok()) return FailBackend(done.status, context);
  if (!backend_status_.ok()) return FailBackend(backend_status_, context);
  if (done.tag == kSharedDone) return ContinueIfRouted(context);
  if (!compute_.at_experts()) return FinishStep(context);
  link_.Request(step_, compute_.layer(), compute_.expert_input(), batch_.m, context);
  shared_running_ = true;
  context.Submit([this] { return compute_.RunShared(); }, kSharedDone);
}

void AttentionActor::Impl::ContinueIfRouted(runtime::Context& context) {
  if (shared_running_ || !link_.answered() || !backend_status_.ok()) return;
  compute_.SetRouted(link_.routed());
  SubmitLayers(context);
}

void AttentionActor::Impl::FinishStep(runtime::Context& context) {
  step_in_flight_ = false;
  ++counters_.local.steps;
  counters_.local.rows += batch_.m;
  for (size_t i = 0; i < items_.size(); ++i) {
    Sequence* sequence = items_[i].sequence;
    if (sequence->state == SequenceState::kFinished) continue;  // cancelled meanwhile
    scheduler_.Advance(items_[i]);
    const int32_t begin = batch_.first_head[i];
    const int32_t end = batch_.first_head[i + 1];
    if (sequence->is_score) {
      EmitScores(sequence, begin, end, context);
    } else if (begin != end) {
      CHECK_EQ(end - begin, 1);
      EmitToken(sequence, begin, context);
    }
  }
}

void AttentionActor::Impl::EmitToken(Sequence* sequence, int32_t head, runtime::Context& context) {
  const TokenId token = batch_.tokens[head];
  TokenEvent event;
  event.request = sequence->id;
  event.index = sequence->generated();
  event.token = token;
  event.logprob = batch_.logprobs[head];
  event.row_digest = batch_.digests[head];
  event.preemptions = sequence->preemptions;
  sequence->tokens.push_back(token);
  ++counters_.local.tokens_out;
  if (EndsWithStop(*sequence, token)) {
    event.finish_reason = FinishReason::kStop;
  } else if (sequence->length() >= sequence->max_length) {
    event.finish_reason = FinishReason::kLength;
  }
  if (sequence->on_token) sequence->on_token(event);
  if (event.finish_reason != FinishReason::kNone) Finish(sequence, context);
}

bool AttentionActor::Impl::EndsWithStop(Sequence& sequence, TokenId token) {
  if (!sequence.ignore_eos &&
      std::find(eos_token_ids_.begin(), eos_token_ids_.end(), token) != eos_token_ids_.end()) {
    return true;
  }
  if (sequence.stop.empty() || tokenizer_->IsSpecial(token)) return false;
  // Bytes, not text: a match in UTF-8 bytes is a match in the text that they spell.
  return sequence.stop.Append(tokenizer_->TokenBytes(token));
}

void AttentionActor::Impl::EmitScores(Sequence* sequence, int32_t begin, int32_t end,
                                      runtime::Context& context) {
  for (int32_t head = begin; head < end; ++head) {
    score_event_.request = sequence->id;
    score_event_.position = static_cast<uint64_t>(sequence->scored++);
    score_event_.next_logprob = batch_.logprobs[head];
    score_event_.row_digest = batch_.digests[head];
    const size_t top = static_cast<size_t>(head) * (1 + batch_.max_top_n) + 1;
    const TokenId* ids = batch_.score_ids.data() + top;
    const float* logprobs = batch_.score_logprobs.data() + top;
    score_event_.top_ids.assign(ids, ids + sequence->top_n);
    score_event_.top_logprobs.assign(logprobs, logprobs + sequence->top_n);
    score_event_.last = sequence->scored == sequence->length();
    sequence->on_score(score_event_);
  }
  if (sequence->scored == sequence->length()) Finish(sequence, context);
}

void AttentionActor::Impl::FailBackend(const absl::Status& status, runtime::Context& context) {
  const bool first = backend_status_.ok();
  // Whatever the backend calls it, it is no fault of a request.
  if (first) backend_status_ = absl::InternalError(absl::StrCat("backend: ", status.message()));
  while (Sequence* sequence = scheduler_.Oldest()) {
    EndEarly(sequence, FinishReason::kError, backend_status_, context);
  }
  if (first && on_backend_failure_) on_backend_failure_(status);
  // The step ends when no compute work refers to it any more.
  if (layers_running_ || shared_running_) return;
  link_.Reset();
  step_in_flight_ = false;
}

void AttentionActor::Impl::PublishCounters() {
  AttentionCounters& counters = counters_.local;
  counters.preemptions = scheduler_.preemptions();
  counters.route_requests = link_.requests();
  counters.route_resends = link_.resends();
  counters.route_rejected = link_.rejected();
  counters.running = scheduler_.running();
  counters.waiting = scheduler_.waiting();
  counters.blocks_used = static_cast<uint64_t>(pool_.used_blocks());
  counters.blocks_total = static_cast<uint64_t>(pool_.total_blocks());
  counters_.Publish();
}

AttentionActor::AttentionActor(const AttentionModel& model, const AttentionOptions& options) {
  CHECK(ValidateOptions(*model.config, options).ok());
  impl_ = std::make_unique<Impl>(model, options);
}
AttentionActor::~AttentionActor() = default;
void AttentionActor::Start(runtime::Context& context) { impl_->Start(context); }
void AttentionActor::Receive(runtime::Message message, runtime::Context& context) {
  impl_->Receive(message, context);
}
AttentionCounters AttentionActor::counters() const { return impl_->counters(); }

}  // namespace moebius::attention_worker
