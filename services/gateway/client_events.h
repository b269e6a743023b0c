#pragma once

// A stream's events as its client gets them: text that never ends within a code point, usage at the
// end. The same whoever makes the tokens, and wherever the stream was cut and taken up again. Used
// by one thread at a time; no gRPC.

#include <cstdint>
#include <memory>
#include <string>

#include "absl/types/span.h"
#include "base/ids.h"
#include "model/tokenizer.h"
#include "moebius/v1/generation.pb.h"
#include "moebius/v1/worker.pb.h"
#include "services/common/model_host.h"

namespace moebius::services {

// Trailing metadata of a call that ends with UNAVAILABLE because the gateway has waited for a
// worker in vain: to ask again at once would be in vain as well. Without it the gateway itself went
// away, and the request may be sent again, with what has been received of it (v1::Resume).
inline constexpr char kWaitedMetadata[] = "moebius-waited";

class ClientEvents {
 public:
  // `before`: tokens that the client has already, with their text. `host` must outlive this object.
  ClientEvents(const ModelHost& host, std::string request_id, size_t prompt_tokens,
               absl::Span<const TokenId> before);

  // REQUIRES: not a beat; indices go on from `before`.
  v1::GenerateEvent Next(const v1::WorkerToken& token);
  // Another worker goes on: it counts its preemptions from 0.
  void NextWorker();

 private:
  const std::string request_id_;
  const size_t prompt_tokens_;
  std::unique_ptr<model::StreamDecoder> decoder_;  // nullptr: the model has no tokenizer
  uint64_t completion_tokens_;
  uint64_t preemptions_before_ = 0;
  uint64_t preemptions_ = 0;  // of the present worker
};

}  // namespace moebius::services
