#include "attention_worker/attention_options.h"

#include "base/status_macros.h"
#include "model/config.h"

namespace moebius::attention_worker {

absl::Status ValidateOptions(const model::ModelConfig& config, const AttentionOptions& options) {
  const auto require = [](bool ok, const char* message) {
    return ok ? absl::OkStatus() : absl::InvalidArgumentError(message);
  };
  RETURN_IF_ERROR(require(options.num_blocks > 0, "num_blocks: must be positive"));
  RETURN_IF_ERROR(require(options.max_step_tokens > 0, "max_step_tokens: must be positive"));
  RETURN_IF_ERROR(require(options.prefill_chunk > 0, "prefill_chunk: must be positive"));
  RETURN_IF_ERROR(require(options.max_running > 0, "max_running: must be positive"));
  RETURN_IF_ERROR(require(options.max_running <= options.max_step_tokens,
                          "max_running: must not exceed max_step_tokens"));
  RETURN_IF_ERROR(require(options.max_waiting > 0, "max_waiting: must be positive"));
  RETURN_IF_ERROR(require(options.head_slice_rows > 0, "head_slice_rows: must be positive"));
  RETURN_IF_ERROR(require(options.max_top_n >= 0, "max_top_n: must not be negative"));
  RETURN_IF_ERROR(require(options.route_timeout.count() > 0, "route_timeout: must be positive"));
  RETURN_IF_ERROR(
      require(options.max_context >= 0 && options.max_context <= config.max_position_embeddings,
              "max_context: must be from 0 to the model's max_position_embeddings"));
  RETURN_IF_ERROR(require(options.sampled_vocab >= 0 && options.sampled_vocab <= config.vocab_size,
                          "sampled_vocab: must be from 0 to the model's vocab_size"));
  for (const TokenId id : options.eos_token_ids) {
    RETURN_IF_ERROR(require(id >= 0 && id < config.vocab_size,
                            "eos_token_ids: must lie within the vocabulary"));
  }
  return absl::OkStatus();
}

}  // namespace moebius::attention_worker
