#pragma once

// What a gateway remembers of one stream, so that another worker can take it up where one that died
// left it: the tokens so far. With them, the prompt and the parameters, every later token is
// settled (docs/exactness.md), so nothing else has to be saved and nothing has to be asked back.
//
// It also decides how an attempt's end is taken: by the client, or as a reason for another attempt.
// A request that kills workers must not kill all of them: after kMostDeaths deaths aboard with no
// new token in between it fails by itself. From one before that on it is a suspect, and a suspect
// is best tried on a worker that no other suspect has, so that the innocent ones that died with it
// make a token and are free of the suspicion.
//
// A plain state machine, without clocks, threads or gRPC: the simulator runs it too. Not
// thread-safe.

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/ids.h"

namespace moebius::services {

class RequestJournal {
 public:
  static constexpr int kMostDeaths = 3;

  // `generated`: what the client has of the stream already, from elsewhere.
  explicit RequestJournal(std::vector<TokenId> generated = {})
      : generated_(std::move(generated)), ever_aboard_(!generated_.empty()) {}

  // The tokens of the stream so far: the next attempt goes on behind them.
  const std::vector<TokenId>& generated() const { return generated_; }
  uint32_t attempts() const { return attempts_; }
  bool finished() const { return finished_; }
  int deaths() const { return deaths_; }
  bool suspect() const { return deaths_ >= kMostDeaths - 1; }
  // Some worker has had it: it waits for another one as long as it may.
  bool aboard_once() const { return ever_aboard_ || aboard_; }

  // The worker lives and says that it will not have the request (any more): it is full, too small
  // for it, or going.
  static bool IsRefusal(const absl::Status& status);

  void BeginAttempt();

  // The present attempt's worker has taken the request in: if it dies now, that may be the
  // request's doing.
  void TakenAboard() { aboard_ = true; }
  // The request has come further than ever before. Record says so itself.
  void Progressed() { deaths_ = 0; }

  // The next event of the present attempt: a token and its index among the generated ones, or,
  // with token < 0, an end without one. DATA_LOSS, and no effect, if it is not the next one: the
  // attempt is worth nothing then.
  absl::Status Record(uint64_t index, TokenId token, bool last);

  // The present attempt has ended with `status` (OK too) before a last event. OK: make another
  // one. Else that is the request's end, and what to tell the client.
  absl::Status AttemptEnded(const absl::Status& status);

 private:
  std::vector<TokenId> generated_;
  uint32_t attempts_ = 0;
  bool aboard_ = false;
  bool ever_aboard_;          // here, or, for a stream that has tokens, elsewhere
  bool aboard_here_ = false;  // some worker has taken it in for this journal
  bool finished_ = false;
  int deaths_ = 0;  // aboard, since the last token
};

}  // namespace moebius::services
