#pragma once

// Limits and wiring of one attention worker. Everything the actor holds is sized from these numbers
// at construction; nothing grows afterwards.

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "base/ids.h"
#include "runtime/context.h"
#include "runtime/message.h"

namespace moebius::model {
struct ModelConfig;
}

namespace moebius::attention_worker {

struct AttentionOptions {
  // Where the MoE layers' hidden rows go: an actor of this node, or of another.
  runtime::ActorAddress router;
  // How to reach the router's node; nullopt for a router of this node.
  std::optional<runtime::PeerInfo> router_peer;
  // A request to the router without an answer for this long is sent again under the next attempt
  // (checked by a watchdog of this period, so the wait lies between one and two periods).
  runtime::Duration route_timeout = std::chrono::seconds(2);
  // Written into the header of every frame; the router refuses others.
  uint64_t model_digest = 0;
  LaneId lane{0};

  // The latent cache: blocks of 64 tokens, all layers. Bytes = num_blocks * 64 * num_layers *
  // (kv_lora_rank + qk_rope_head_dim) * 2.
  int32_t num_blocks = 256;
  // Token rows of one step, decode and prefill together. At most what the router accepts in one
  // request (its max_rows) and what one payload buffer of the node holds (rows * hidden * 2 bytes).
  int32_t max_step_tokens = 256;
  // Most rows that one sequence's prefill takes from a step.
  int32_t prefill_chunk = 128;
  // Sequences holding cache blocks at one time. At most max_step_tokens: every one of them can
  // decode in each step.
  int32_t max_running = 64;
  // Requests waiting for admission; one more is refused (RESOURCE_EXHAUSTED).
  int32_t max_waiting = 1024;
  // Longest sequence (prompt and generated tokens); 0 = the model's max_position_embeddings.
  int32_t max_context = 0;
  // Rows per call of the LM head: bounds the float32 logits buffer to this many times vocab_size.
  int32_t head_slice_rows = 16;
  // Largest Submit::top_n.
  int32_t max_top_n = 32;

  // Ids from this on are padding rows of the head and never drawn; 0 = vocab_size (none are).
  int64_t sampled_vocab = 0;
  // Tokens that end a stream, from generation_config.json or config.json (an int or a list there);
  // empty = the eos_token_id list of the model's config.
  std::vector<TokenId> eos_token_ids;

  // Called once, on the node's loop, when the backend has failed for good: everything aboard has
  // ended with that error and so will whatever comes. May be empty.
  std::function<void(const absl::Status&)> on_backend_failure;
};

// INVALID_ARGUMENT naming the option that makes no sense for this model.
absl::Status ValidateOptions(const model::ModelConfig& config, const AttentionOptions& options);

// What an attention worker has done and holds. A snapshot; the values of one snapshot may be a few
// events apart.
struct AttentionCounters {
  uint64_t steps = 0;           // completed
  uint64_t rows = 0;            // token rows of those steps (recomputed ones too)
  uint64_t tokens_out = 0;      // generated
  uint64_t requests = 0;        // accepted
  uint64_t refused = 0;         // not accepted
  uint64_t preemptions = 0;     // sequences whose blocks were taken back
  uint64_t route_requests = 0;  // sent, first attempts
  uint64_t route_resends = 0;   // sent again after a loss or timeout
  uint64_t route_rejected = 0;  // answers that matched nothing outstanding, or malformed
  uint64_t running = 0;         // sequences that hold blocks
  uint64_t waiting = 0;         // sequences that hold none
  uint64_t blocks_used = 0;
  uint64_t blocks_total = 0;
};

}  // namespace moebius::attention_worker
