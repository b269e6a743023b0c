#pragma once

// A model directory opened for serving: configuration, checkpoint, digest, tokenizer, and the
// limits that every role derives from them.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attention_worker/attention_options.h"
#include "expert_worker/expert_actor.h"
#include "kernels/backend.h"
#include "model/chat_template.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/manifest.h"
#include "model/tokenizer.h"
#include "model/weights.h"
#include "proto/wire/dispatch.h"
#include "router/router_options.h"
#include "runtime/session.h"

namespace moebius::services {

struct ModelHost {
  std::string dir;
  std::string id;  // the directory's own name
  model::ModelConfig config;
  std::unique_ptr<model::Checkpoint> checkpoint;
  model::Manifest manifest;
  std::unique_ptr<model::Tokenizer> tokenizer;                   // nullptr: token ids only
  model::ChatTemplate chat_template = model::ChatTemplate::kV3;  // only with a tokenizer

  // Tokens that may be drawn: padding rows of the head are not among them.
  int64_t sampled_vocab() const;
};

// Errors name the file. The manifest is computed if there is none yet (one read of the checkpoint).
absl::StatusOr<std::unique_ptr<ModelHost>> OpenModel(const std::string& dir);

// An attention worker's weights, every tensor checked against the manifest. Errors: DATA_LOSS names
// the file and tensor.
absl::StatusOr<std::unique_ptr<model::AttentionWorkerWeights>> LoadAttentionWeights(
    const ModelHost& host);

// INVALID_ARGUMENT that names num_blocks if the latent cache would be larger than this machine's
// memory.
absl::Status CheckLatentCache(const model::ModelConfig& config, int64_t num_blocks);

// The backend of this machine. `threads` counts the calling one.
std::unique_ptr<kernels::Backend> MakeBackend(int threads);

// What peers must agree on before they exchange a row.
runtime::SessionIdentity MakeIdentity(const ModelHost& host, const kernels::Backend& backend,
                                      uint64_t node, uint64_t incarnation, wire::NodeRole role);

wire::RowLimits MakeRowLimits(const model::ModelConfig& config, uint32_t max_rows);
router::RouterOptions MakeRouterOptions(const model::ModelConfig& config,
                                        const model::AttentionWorkerWeights& weights,
                                        uint32_t max_rows);
expert_worker::ExpertOptions MakeExpertOptions(const model::ModelConfig& config, uint32_t max_rows);

// Rows of one step, and so of one route request, in every role. Part of what a cluster agrees on.
inline constexpr uint32_t kMaxStepRows = 512;

kernels::ExpertWeights ToKernelWeights(const model::MlpWeights& weights);

// Loads one layer's experts and checks every tensor that was mapped against the manifest.
absl::StatusOr<expert_worker::HostExperts> LoadExperts(const ModelHost& host, LayerId layer,
                                                       const std::vector<ExpertId>& experts);

// A number that no earlier start of a process can have had.
uint64_t FreshIncarnation();
uint64_t FreshNodeId();
// The node that bears this name.
uint64_t NodeIdOf(const std::string& name);

}  // namespace moebius::services
