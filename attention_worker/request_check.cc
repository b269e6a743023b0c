#include "attention_worker/request_check.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "attention_worker/kv_block_pool.h"
#include "base/status_macros.h"

namespace moebius::attention_worker {
namespace {

absl::Status CheckIds(const std::vector<TokenId>& ids, absl::string_view field,
                      const RequestLimits& limits) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= limits.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, "[", i, "]: token id outside [0, ", limits.vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPrompt(const Submit& request, const RequestLimits& limits) {
  const auto length = static_cast<int64_t>(request.prompt.size());
  if (length == 0) return absl::InvalidArgumentError("prompt: is empty");
  RETURN_IF_ERROR(CheckIds(request.prompt, "prompt", limits));
  // Generating needs a place for one token at least.
  const bool generates = !request.on_score && request.max_tokens > 0;
  const int64_t longest = limits.max_context - (generates ? 1 : 0);
  if (length > longest) {
    return absl::OutOfRangeError(absl::StrCat("prompt: ", length, " tokens, at most ", longest,
                                              " fit the context of ", limits.max_context));
  }
  if (BlocksForTokens(length) > limits.num_blocks) {
    return absl::OutOfRangeError(absl::StrCat("prompt: needs ", BlocksForTokens(length),
                                              " cache blocks, the cache has ", limits.num_blocks));
  }
  return absl::OkStatus();
}

absl::Status CheckGenerated(const Submit& request, const RequestLimits& limits) {
  const size_t count = request.generated.size();
  if (count == 0) return absl::OkStatus();
  if (request.on_score) {
    return absl::InvalidArgumentError("generated: must be empty for a score request");
  }
  if (count > request.max_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("generated: ", count, " tokens, max_tokens is ", request.max_tokens));
  }
  if (static_cast<int64_t>(request.prompt.size() + count) > limits.max_context) {
    return absl::OutOfRangeError(absl::StrCat("generated: ", count, " tokens behind a prompt of ",
                                              request.prompt.size(), ", the context holds ",
                                              limits.max_context));
  }
  return CheckIds(request.generated, "generated", limits);
}

absl::Status CheckSampling(const kernels::SamplingParams& sampling) {
  // Written so that NaN fails each test.
  if (!(sampling.temperature >= 0.0f && sampling.temperature <= 1e6f)) {
    return absl::InvalidArgumentError("temperature: must be a number from 0 to 1e6");
  }
  if (sampling.top_k < 0) return absl::InvalidArgumentError("top_k: must not be negative");
  if (!(sampling.top_p > 0.0f && sampling.top_p <= 1.0f)) {
    return absl::InvalidArgumentError("top_p: must be in (0, 1]");
  }
  return absl::OkStatus();
}

}  // namespace

int64_t FinalLength(const Submit& request, const RequestLimits& limits) {
  const auto length = static_cast<int64_t>(request.prompt.size());
  const auto room = static_cast<uint64_t>(std::max<int64_t>(limits.max_context - length, 0));
  return length + static_cast<int64_t>(std::min(request.max_tokens, room));
}

absl::Status CheckRequest(const Submit& request, const RequestLimits& limits) {
  RETURN_IF_ERROR(CheckPrompt(request, limits));
  RETURN_IF_ERROR(CheckGenerated(request, limits));
  RETURN_IF_ERROR(CheckSampling(request.sampling));
  if (request.deadline_ms < 0) {
    return absl::InvalidArgumentError("deadline_ms: must not be negative");
  }
  if (request.on_score) {
    if (request.max_tokens != 0) {
      return absl::InvalidArgumentError("max_tokens: must be 0 for a score request");
    }
    if (request.top_n > limits.max_top_n || request.top_n > limits.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("top_n: ", request.top_n, ", at most ",
                       std::min<int64_t>(limits.max_top_n, limits.vocab_size)));
    }
  }
  if (!request.stop_strings.empty() && !limits.has_tokenizer) {
    return absl::FailedPreconditionError("stop_strings: this worker has no tokenizer");
  }
  // The last token generated needs no cache row of its own.
  const int64_t cached = std::max<int64_t>(FinalLength(request, limits) - 1,
                                           static_cast<int64_t>(request.prompt.size()));
  if (BlocksForTokens(cached) > limits.num_blocks) {
    return absl::OutOfRangeError(absl::StrCat("max_tokens: prompt and generation need ",
                                              BlocksForTokens(cached),
                                              " cache blocks, the cache has ", limits.num_blocks));
  }
  return absl::OkStatus();
}

}  // namespace moebius::attention_worker
