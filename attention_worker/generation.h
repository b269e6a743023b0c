#pragma once

// Requests to an attention worker and what comes back. Posted to the actor by the composition root
// (gRPC service, command line, simulated client). Plain records.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/ids.h"
#include "kernels/sampling.h"
#include "runtime/context.h"
#include "runtime/message.h"

namespace moebius::attention_worker {

enum class FinishReason : uint8_t {
  kNone = 0,  // more tokens follow
  kStop,      // eos or a stop string
  kLength,    // max_tokens or the model's context is reached
  kCancelled,
  kDeadline,
  kError,  // `status` says what
};

// One event of a request's stream, in order of index. The last one has finish_reason != kNone. A
// final event without a token (cancel, deadline, error, max_tokens == 0) has token = -1.
struct TokenEvent {
  RequestId request;
  uint64_t index = 0;  // of the token among the generated ones, from 0; consecutive, never repeated
  TokenId token = -1;
  float logprob = 0;        // of the unmodified distribution
  uint64_t row_digest = 0;  // kernels/sampling.h, RowDigestParams
  FinishReason finish_reason = FinishReason::kNone;
  uint32_t preemptions = 0;  // of this request so far
  absl::Status status;
};

// Score of one prompt position (only for score requests), in order of position.
struct ScoreEvent {
  RequestId request;
  uint64_t position = 0;   // predicts the token at position + 1
  float next_logprob = 0;  // of the prompt's own next token; 0 for the last position
  uint64_t row_digest = 0;
  std::vector<TokenId> top_ids;  // best first, ties to the lower id
  std::vector<float> top_logprobs;
  bool last = false;
};

// Sinks run on the node's loop thread: they must only hand the event over, never block.
struct Submit {
  RequestId request;
  std::vector<TokenId> prompt;  // resolved ids, not empty, already within vocabulary and context
  // Tokens of this request that another worker has generated and told already: the stream goes on
  // behind them, to the same bits, and its first event has their number as its index. They count
  // towards max_tokens. Not for score requests.
  std::vector<TokenId> generated;
  kernels::SamplingParams sampling;
  uint64_t max_tokens = 0;
  std::vector<std::string> stop_strings;  // need a tokenizer; the match ends the stream
  bool ignore_eos = false;
  int64_t deadline_ms = 0;  // from receipt; 0 = none
  std::function<void(const TokenEvent&)> on_token;
  // Score request: set on_score (then max_tokens is 0 and nothing is generated). It ends with the
  // ScoreEvent that has last == true, or, if it fails, with a final event to on_token.
  uint32_t top_n = 0;
  std::function<void(const ScoreEvent&)> on_score;
};

// Frees the request's blocks at once; its stream ends with kCancelled. Unknown ids are ignored.
struct Cancel {
  RequestId request;
};

// Answered from the loop at once: it runs.
struct Ping {
  std::function<void()> on_pong;
};

// Refuse new requests, finish those aboard, then call `on_drained` (once, on the loop thread).
struct Drain {
  std::function<void()> on_drained;
};

// Use another router from now on (also for the layer that waits for an answer).
struct RouterUpdate {
  runtime::ActorAddress router;
  std::optional<runtime::PeerInfo> peer;  // nullopt for a router of this node
};

}  // namespace moebius::attention_worker
