#include "model/inspect.h"

#include <algorithm>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "model/json_value.h"
#include "model/weights.h"

namespace moebius::model {
namespace {

enum class Part { kAttentionWorker, kGate, kExpert, kIgnored };

struct Classified {
  Part part = Part::kIgnored;
  int64_t layer = -1;   // -1: outside the layers
  int64_t expert = -1;  // of Part::kExpert
};

Classified Classify(const std::string& name, const ModelConfig& config) {
  if (name == "model.embed_tokens.weight" || name == "model.norm.weight" ||
      name == "lm_head.weight") {
    return {Part::kAttentionWorker, -1, -1};
  }
  const std::vector<absl::string_view> parts = absl::StrSplit(name, '.');
  int64_t layer = 0;
  if (parts.size() < 4 || parts[0] != "model" || parts[1] != "layers" ||
      !absl::SimpleAtoi(parts[2], &layer) || layer < 0 || layer >= config.total_layers()) {
    return {};
  }
  const bool is_copy = parts[3] == "embed_tokens" ||
                       (parts[3] == "shared_head" && parts.size() > 4 && parts[4] == "head");
  if (config.is_mtp_layer(layer) && is_copy) {
    return {Part::kIgnored, layer, -1};
  }
  if (parts[3] == "mlp" && parts.size() > 5 && parts[4] == "experts") {
    int64_t expert = 0;
    if (!absl::SimpleAtoi(parts[5], &expert)) return {};
    return {Part::kExpert, layer, expert};
  }
  if (parts[3] == "mlp" && parts.size() > 4 && parts[4] == "gate") return {Part::kGate, layer, -1};
  if (absl::StrContains(name, "rotary_emb")) return {};
  return {Part::kAttentionWorker, layer, -1};
}

int64_t Elements(const TensorInfo& tensor) {
  int64_t count = 1;
  for (const int64_t dimension : tensor.shape) count *= dimension;
  return count;
}

std::string Bytes(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? absl::StrCat(bytes, " B")
                   : absl::StrFormat("%.2f %s (%d B)", value, units[unit], bytes);
}

std::string Count(int64_t count) {
  if (count >= 1'000'000'000) return absl::StrFormat("%.2f B (%d)", count / 1e9, count);
  if (count >= 1'000'000) return absl::StrFormat("%.2f M (%d)", count / 1e6, count);
  return absl::StrCat(count);
}

}  // namespace

ModelReport InspectModel(const Checkpoint& checkpoint, const ModelConfig& config) {
  ModelReport report;
  report.config = config;
  report.tensors = static_cast<int64_t>(checkpoint.entries().size());
  report.files = static_cast<int64_t>(checkpoint.files().size());
  std::map<std::pair<int64_t, int64_t>, int64_t> expert_bytes;
  int64_t expert_parameters = 0;
  for (const Checkpoint::Entry& entry : checkpoint.entries()) {
    const TensorInfo& tensor = *entry.info;
    const int64_t bytes = static_cast<int64_t>(tensor.bytes);
    ModelReport::TypeCount& type = report.types[Name(tensor.dtype)];
    ++type.tensors;
    type.bytes += bytes;
    const Classified where = Classify(tensor.name, config);
    if (where.part == Part::kIgnored) {
      report.ignored_bytes += bytes;
      continue;
    }
    if (where.part == Part::kExpert) {
      expert_bytes[{where.layer, where.expert}] += bytes;
      report.all_experts_bytes += bytes;
    } else {
      report.attention_worker_bytes += bytes;
      if (where.part == Part::kGate) report.gate_bytes += bytes;
    }
    if (absl::EndsWith(tensor.name, "_scale_inv")) continue;
    const int64_t elements = Elements(tensor);
    if (where.layer >= 0 && config.is_mtp_layer(where.layer)) {
      report.mtp_parameters += elements;
      continue;
    }
    report.parameters += elements;
    if (where.part == Part::kExpert) {
      expert_parameters += elements;
    } else {
      report.activated_parameters += elements;
    }
  }
  std::set<int64_t> moe_layers;
  for (const auto& [key, bytes] : expert_bytes) {
    moe_layers.insert(key.first);
    report.expert_bytes = std::max(report.expert_bytes, bytes);
  }
  report.moe_layers = static_cast<int64_t>(moe_layers.size());
  if (config.n_routed_experts > 0) {
    // All experts of a layer have one shape, so the chosen share is exact.
    report.activated_parameters +=
        expert_parameters / config.n_routed_experts * config.num_experts_per_tok;
  }
  int64_t cached_layers = config.num_hidden_layers;
  for (int64_t module = 0; module < config.num_nextn_predict_layers; ++module) {
    cached_layers += HasMtpLayer(checkpoint, config, module) ? 1 : 0;
  }
  report.latent_cache_bytes_per_token = cached_layers * config.latent_dim() * 2;
  return report;
}

std::string FormatReport(const ModelReport& r) {
  const ModelConfig& c = r.config;
  std::string out;
  const auto line = [&](absl::string_view name, const std::string& value) {
    absl::StrAppend(&out, absl::StrFormat("%-24s %s\n", name, value));
  };
  line("model type", Name(c.model_type));
  line("layers", absl::StrCat(c.num_hidden_layers, " and ", c.num_nextn_predict_layers, " MTP, ",
                              r.moe_layers, " of them with experts"));
  line("hidden size", absl::StrCat(c.hidden_size));
  line("vocabulary", absl::StrCat(c.vocab_size));
  line("context", absl::StrCat(c.max_position_embeddings, " tokens"));
  line("attention", absl::StrCat(c.num_attention_heads, " heads, latent ", c.kv_lora_rank, " + ",
                                 c.qk_rope_head_dim));
  if (c.n_routed_experts > 0) {
    line("experts a layer",
         absl::StrCat(c.n_routed_experts, " routed, ", c.num_experts_per_tok, " chosen, ",
                      c.n_shared_experts, " shared, ", c.n_group, " groups"));
  }
  line("parameters", Count(r.parameters));
  line("  activated a token", Count(r.activated_parameters));
  if (r.mtp_parameters > 0) line("  MTP besides", Count(r.mtp_parameters));
  line("expert row dtype", Name(c.wire_dtype()));
  line("tensors", absl::StrCat(r.tensors, " in ", r.files, r.files == 1 ? " file" : " files"));
  for (const auto& [name, type] : r.types) {
    line(absl::StrCat("  ", name), absl::StrCat(type.tensors, " tensors, ", Bytes(type.bytes)));
  }
  line("attention worker", Bytes(r.attention_worker_bytes));
  if (r.gate_bytes > 0) line("  gates alone (router)", Bytes(r.gate_bytes));
  if (r.expert_bytes > 0) {
    line("one expert", Bytes(r.expert_bytes));
    line("all experts", Bytes(r.all_experts_bytes));
  }
  if (r.ignored_bytes > 0) line("not used", Bytes(r.ignored_bytes));
  line("latent cache a token", Bytes(r.latent_cache_bytes_per_token));
  return out;
}

std::string ReportToJson(const ModelReport& r) {
  JsonValue::Object root;
  const auto number = [](int64_t value) { return JsonValue::OfUint(static_cast<uint64_t>(value)); };
  root.emplace_back("model_type", JsonValue::OfString(Name(r.config.model_type)));
  root.emplace_back("wire_dtype", JsonValue::OfString(Name(r.config.wire_dtype())));
  const std::pair<const char*, int64_t> fields[] = {
      {"tensors", r.tensors},
      {"files", r.files},
      {"parameters", r.parameters},
      {"mtp_parameters", r.mtp_parameters},
      {"activated_parameters", r.activated_parameters},
      {"n_routed_experts", r.config.n_routed_experts},
      {"moe_layers", r.moe_layers},
      {"attention_worker_bytes", r.attention_worker_bytes},
      {"gate_bytes", r.gate_bytes},
      {"expert_bytes", r.expert_bytes},
      {"all_experts_bytes", r.all_experts_bytes},
      {"ignored_bytes", r.ignored_bytes},
      {"latent_cache_bytes_per_token", r.latent_cache_bytes_per_token},
  };
  for (const auto& [name, value] : fields) root.emplace_back(name, number(value));
  JsonValue::Object types;
  for (const auto& [name, type] : r.types) {
    JsonValue::Object entry;
    entry.emplace_back("tensors", number(type.tensors));
    entry.emplace_back("bytes", number(type.bytes));
    types.emplace_back(name, JsonValue::OfObject(std::move(entry)));
  }
  root.emplace_back("types", JsonValue::OfObject(std::move(types)));
  return WriteJson(JsonValue::OfObject(std::move(root)), 2);
}

}  // namespace moebius::model
