#pragma once

// One request aboard: its tokens, the cache blocks it holds, how far it has come. A plain record
// that the scheduler owns and the actor reads; loop thread only, except block_table, which compute
// work reads during a step (it changes only between steps).

#include <cstdint>
#include <functional>
#include <vector>

#include "attention_worker/generation.h"
#include "attention_worker/stop_matcher.h"
#include "base/ids.h"

namespace moebius::attention_worker {

enum class SequenceState : uint8_t {
  kWaiting,   // holds no blocks
  kRunning,   // holds blocks for tokens[0 .. computed)
  kFinished,  // its last event is out; kept until the step in flight has ended
};

struct Sequence {
  RequestId id;
  SequenceState state = SequenceState::kWaiting;
  uint64_t arrival = 0;  // the order of admission, kept across preemptions

  std::vector<TokenId> tokens;  // the prompt, then what was generated; never shortened
  int64_t prompt_length = 0;
  int64_t max_length = 0;  // of tokens: generation ends with kLength there
  int64_t computed = 0;    // leading tokens whose cache rows are written; 0 after a preemption
  std::vector<int32_t> block_table;

  kernels::SamplingParams sampling;
  bool ignore_eos = false;
  StopMatcher stop;

  bool is_score = false;
  uint32_t top_n = 0;
  int64_t scored = 0;  // positions whose ScoreEvent is out; not repeated by a recomputation

  uint32_t preemptions = 0;
  uint64_t deadline_timer = 0;  // of Context::SetTimer; 0 = none
  std::function<void(const TokenEvent&)> on_token;
  std::function<void(const ScoreEvent&)> on_score;

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  int64_t remaining() const { return length() - computed; }  // rows to compute
  uint64_t generated() const { return static_cast<uint64_t>(length() - prompt_length); }
};

}  // namespace moebius::attention_worker
