#include "services/common/model_host.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "model/chat_template_choice.h"
#include "services/common/buffer_classes.h"

namespace moebius::services {
namespace {

kernels::GateConfig MakeGateConfig(const model::ModelConfig& config) {
  kernels::GateConfig gate;
  gate.n_routed_experts = static_cast<int32_t>(config.n_routed_experts);
  gate.num_experts_per_tok = static_cast<int32_t>(config.num_experts_per_tok);
  gate.n_group = static_cast<int32_t>(config.n_group);
  gate.topk_group = static_cast<int32_t>(config.topk_group);
  gate.scoring_func = config.scoring_func == model::ScoringFunc::kSigmoid
                          ? kernels::ScoringFunc::kSigmoid
                          : kernels::ScoringFunc::kSoftmax;
  switch (config.topk_method) {
    case model::TopkMethod::kGreedy:
      gate.topk_method = kernels::TopkMethod::kGreedy;
      break;
    case model::TopkMethod::kGroupLimitedGreedy:
      gate.topk_method = kernels::TopkMethod::kGroupLimitedGreedy;
      break;
    case model::TopkMethod::kNoauxTc:
      gate.topk_method = kernels::TopkMethod::kNoauxTc;
      break;
  }
  gate.norm_topk_prob = config.norm_topk_prob;
  gate.routed_scaling_factor = static_cast<float>(config.routed_scaling_factor);
  return gate;
}

}  // namespace

int64_t ModelHost::sampled_vocab() const {
  return tokenizer != nullptr ? std::min(tokenizer->id_limit(), config.vocab_size)
                              : config.vocab_size;
}

absl::StatusOr<std::unique_ptr<ModelHost>> OpenModel(const std::string& dir) {
  auto host = std::make_unique<ModelHost>();
  host->dir = dir;
  std::filesystem::path path = std::filesystem::path(dir).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  host->id = path.filename().string();
  ASSIGN_OR_RETURN(host->config, model::LoadConfig(dir));
  ASSIGN_OR_RETURN(host->checkpoint, model::Checkpoint::Open(dir));
  ASSIGN_OR_RETURN(host->manifest, model::LoadOrComputeManifest(*host->checkpoint, host->config,
                                                                model::DefaultManifestCacheDir()));
  absl::StatusOr<model::Tokenizer> tokenizer = model::Tokenizer::Load(dir);
  if (tokenizer.ok()) {
    host->tokenizer = std::make_unique<model::Tokenizer>(*std::move(tokenizer));
    ASSIGN_OR_RETURN(host->chat_template, model::LoadChatTemplate(dir));
  } else if (!absl::IsNotFound(tokenizer.status())) {
    return tokenizer.status();
  }
  return host;
}

absl::StatusOr<std::unique_ptr<model::AttentionWorkerWeights>> LoadAttentionWeights(
    const ModelHost& host) {
  ASSIGN_OR_RETURN(model::AttentionWorkerWeights weights,
                   model::LoadAttentionWorkerWeights(*host.checkpoint, host.config));
  RETURN_IF_ERROR(
      model::VerifyTensors(host.manifest, *host.checkpoint, weights.storage.tensor_names()));
  return std::make_unique<model::AttentionWorkerWeights>(std::move(weights));
}

absl::Status CheckLatentCache(const model::ModelConfig& config, int64_t num_blocks) {
  const double machine =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  const double cache = static_cast<double>(num_blocks) * kernels::kCacheBlockTokens *
                       static_cast<double>(config.num_hidden_layers * config.latent_dim()) *
                       sizeof(Bf16);
  if (cache <= machine) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrFormat("num_blocks: %d blocks of latent cache are %.1f GB, this machine has %.1f GB",
                      num_blocks, cache * 1e-9, machine * 1e-9));
}

std::unique_ptr<kernels::Backend> MakeBackend(int threads) {
  kernels::cpu::CpuBackendOptions options;
  options.num_threads = threads;
  auto backend = kernels::cpu::CpuBackend::Create(options);
  CHECK(backend.ok());  // threads >= 1, and no target is forced
  return *std::move(backend);
}

runtime::SessionIdentity MakeIdentity(const ModelHost& host, const kernels::Backend& backend,
                                      uint64_t node, uint64_t incarnation, wire::NodeRole role) {
  runtime::SessionIdentity identity;
  identity.node = NodeId(node);
  identity.incarnation = Incarnation(incarnation);
  identity.role = role;
  identity.model_digest = host.manifest.digest;
  const std::string numerics =
      absl::StrCat(backend.NumericsName(), "/", model::Name(host.config.wire_dtype()));
  identity.numerics_class = Hash64(numerics.data(), numerics.size());
  return identity;
}

wire::RowLimits MakeRowLimits(const model::ModelConfig& config, uint32_t max_rows) {
  wire::RowLimits limits;
  limits.hidden = static_cast<uint32_t>(config.hidden_size);
  limits.layers = static_cast<uint32_t>(config.total_layers());
  limits.experts_per_layer = static_cast<uint32_t>(config.n_routed_experts);
  limits.top_k = static_cast<uint32_t>(config.num_experts_per_tok);
  limits.max_rows = max_rows;
  limits.e4m3 = config.wire_dtype() == model::WireDtype::kE4m3;
  return limits;
}

router::RouterOptions MakeRouterOptions(const model::ModelConfig& config,
                                        const model::AttentionWorkerWeights& weights,
                                        uint32_t max_rows) {
  router::RouterOptions options;
  options.limits = MakeRowLimits(config, max_rows);
  options.gate = MakeGateConfig(config);
  options.power_of_two_scales = config.power_of_two_scales();
  options.layers.resize(options.limits.layers);
  for (const model::AttentionLayerWeights& layer : weights.layers) {
    if (!layer.moe) continue;
    router::GateWeights& gate = options.layers[layer.layer.value()];
    gate.gate = layer.moe->gate;
    gate.bias = layer.moe->e_score_correction_bias.empty()
                    ? nullptr
                    : layer.moe->e_score_correction_bias.data();
  }
  options.max_rows_per_frame = kRowsPerFrame;
  return options;
}

expert_worker::ExpertOptions MakeExpertOptions(const model::ModelConfig& config,
                                               uint32_t max_rows) {
  expert_worker::ExpertOptions options;
  options.limits = MakeRowLimits(config, max_rows);
  options.intermediate = config.moe_intermediate_size;
  options.power_of_two_scales = config.power_of_two_scales();
  options.max_batch_items = 2 * max_rows * options.limits.top_k;
  return options;
}

kernels::ExpertWeights ToKernelWeights(const model::MlpWeights& weights) {
  return kernels::ExpertWeights{weights.gate_proj, weights.up_proj, weights.down_proj};
}

absl::StatusOr<expert_worker::HostExperts> LoadExperts(const ModelHost& host, LayerId layer,
                                                       const std::vector<ExpertId>& experts) {
  auto shards = std::make_shared<std::vector<model::ExpertShard>>();
  expert_worker::HostExperts order;
  for (ExpertId expert : experts) {
    ASSIGN_OR_RETURN(model::ExpertShard shard,
                     model::LoadExpertShard(*host.checkpoint, host.config, layer, expert));
    RETURN_IF_ERROR(
        model::VerifyTensors(host.manifest, *host.checkpoint, shard.storage.tensor_names()));
    shards->push_back(std::move(shard));
  }
  for (const model::ExpertShard& shard : *shards) {
    order.experts.push_back(
        expert_worker::HostedExpert{shard.layer, shard.expert, ToKernelWeights(shard.weights)});
  }
  order.owner = shards;
  return order;
}

uint64_t FreshIncarnation() {
  // Wall clock in nanoseconds: later starts have larger numbers, across machines that know the time
  // roughly.
  return static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
}

uint64_t FreshNodeId() {
  std::random_device device;
  return (uint64_t{device()} << 32 | device()) | 1;
}

uint64_t NodeIdOf(const std::string& name) { return Hash64(name.data(), name.size()) | 1; }

}  // namespace moebius::services
