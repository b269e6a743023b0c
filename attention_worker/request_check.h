#pragma once

// What a request must satisfy before it is taken aboard. Requests come from outside (the gateway
// checks too, but an attention worker believes nobody): a bad one gets a Status that names the
// field, never a crash. Messages hold numbers, never prompt text or ids. Pure.

#include <cstdint>

#include "absl/status/status.h"
#include "attention_worker/generation.h"

namespace moebius::attention_worker {

struct RequestLimits {
  int64_t vocab_size = 0;   // rows of the embedding
  int64_t max_context = 0;  // tokens of a sequence
  int64_t num_blocks = 0;
  uint32_t max_top_n = 0;
  bool has_tokenizer = false;
};

// Tokens the request's sequence can reach: prompt + max_tokens (of which those generated already
// are a part), cut at the context.
int64_t FinalLength(const Submit& request, const RequestLimits& limits);

// INVALID_ARGUMENT (malformed), OUT_OF_RANGE (beyond the context, or more than the whole cache),
// FAILED_PRECONDITION (stop strings without a tokenizer).
absl::Status CheckRequest(const Submit& request, const RequestLimits& limits);

}  // namespace moebius::attention_worker
