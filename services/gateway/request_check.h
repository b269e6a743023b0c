#pragma once

// From what a client sent to what a worker may run: every field checked, text resolved to token
// ids, defaults put in. Pure; errors are INVALID_ARGUMENT (NOT_FOUND for the model,
// FAILED_PRECONDITION for a stream of another model that is to go on) and name the field. No gRPC.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "moebius/v1/generation.pb.h"
#include "moebius/v1/worker.pb.h"
#include "services/common/model_host.h"

namespace moebius::services {

struct RequestLimits {
  int64_t max_context = 0;  // tokens of prompt and answer together
  int64_t default_max_tokens = 256;
  int64_t default_deadline_ms = 600'000;  // 0: none
  int64_t max_deadline_ms = 86'400'000;
};

absl::StatusOr<v1::ResolvedRequest> ResolveGenerate(const ModelHost& host,
                                                    const RequestLimits& limits,
                                                    const v1::GenerateRequest& request);
absl::StatusOr<v1::ResolvedScore> ResolveScore(const ModelHost& host, const RequestLimits& limits,
                                               const v1::ScoreRequest& request);
absl::StatusOr<std::vector<TokenId>> ResolveTokenize(const ModelHost& host,
                                                     const v1::TokenizeRequest& request);

}  // namespace moebius::services
