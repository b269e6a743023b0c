#include "model/config.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "model/json_value.h"
#include "model/rope.h"

namespace moebius::model {
namespace {

// Bounds of every size. Far above any published model, and small enough that the product of three
// of them with an element size cannot overflow int64_t.
constexpr int64_t kMaxSize = int64_t{1} << 20;
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxPositions = int64_t{1} << 30;
// What the gate kernels hold per row; published models reach 384 and 8.
constexpr int64_t kMaxRoutedExperts = 1024;
constexpr int64_t kMaxExpertsPerToken = 64;
constexpr uint64_t kMaxConfigBytes = 16 << 20;

absl::Status Bad(absl::string_view field, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat("config field ", field, ": ", problem));
}

absl::Status Unsupported(absl::string_view field, absl::string_view problem) {
  return absl::UnimplementedError(absl::StrCat("config field ", field, ": ", problem));
}

// Reads fields of one JSON object; keeps the first error, so that callers can read all fields
// first and check once.
class FieldReader {
 public:
  FieldReader(const JsonValue& object, absl::string_view prefix)
      : object_(object), prefix_(prefix) {}

  const absl::Status& status() const { return status_; }
  std::string Path(absl::string_view key) const { return absl::StrCat(prefix_, key); }

  // The member, or nullptr if absent or null.
  const JsonValue* Find(absl::string_view key) const {
    const JsonValue* value = object_.Find(key);
    return value == nullptr || value->is_null() ? nullptr : value;
  }

  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  int64_t Int(absl::string_view key, int64_t low, int64_t high,
              std::optional<int64_t> fallback = std::nullopt) {
    const JsonValue* value = Find(key);
    if (value == nullptr) {
      if (!fallback) Fail(Bad(Path(key), "missing"));
      return fallback.value_or(low);
    }
    const uint64_t* number = value->AsUint();
    if (number == nullptr) {
      Fail(Bad(Path(key),
               absl::StrCat("is ", value->AsNegativeInt() ? "negative" : value->KindName(),
                            ", expected a non-negative integer")));
      return low;
    }
    if (*number > static_cast<uint64_t>(high) || static_cast<int64_t>(*number) < low) {
      Fail(Bad(Path(key), absl::StrCat(*number, " is outside [", low, ", ", high, "]")));
      return low;
    }
    return static_cast<int64_t>(*number);
  }

  double Number(absl::string_view key, double low, double high,
                std::optional<double> fallback = std::nullopt) {
    const JsonValue* value = Find(key);
    if (value == nullptr) {
      if (!fallback) Fail(Bad(Path(key), "missing"));
      return fallback.value_or(low);
    }
    double number = 0;
    if (!value->GetNumber(&number)) {
      Fail(Bad(Path(key), absl::StrCat("is ", value->KindName(), ", expected a number")));
      return low;
    }
    if (!(number >= low && number <= high)) {
      Fail(Bad(Path(key), absl::StrCat(number, " is outside [", low, ", ", high, "]")));
      return low;
    }
    return number;
  }

  bool Bool(absl::string_view key, std::optional<bool> fallback = std::nullopt) {
    const JsonValue* value = Find(key);
    if (value == nullptr) {
      if (!fallback) Fail(Bad(Path(key), "missing"));
      return fallback.value_or(false);
    }
    const bool* flag = value->AsBool();
    if (flag == nullptr) {
      Fail(Bad(Path(key), absl::StrCat("is ", value->KindName(), ", expected a boolean")));
      return false;
    }
    return *flag;
  }

  std::string Text(absl::string_view key, std::optional<std::string> fallback = std::nullopt) {
    const JsonValue* value = Find(key);
    if (value == nullptr) {
      if (!fallback) Fail(Bad(Path(key), "missing"));
      return fallback.value_or("");
    }
    const std::string* text = value->AsString();
    if (text == nullptr) {
      Fail(Bad(Path(key), absl::StrCat("is ", value->KindName(), ", expected a string")));
      return "";
    }
    return *text;
  }

  // A setting we serve with one value only.
  void RequireText(absl::string_view key, absl::string_view served) {
    const std::string text = Text(key, std::string(served));
    if (status_.ok() && text != served) {
      Fail(Unsupported(Path(key),
                       absl::StrCat("\"", text, "\" is not supported, only \"", served, "\"")));
    }
  }
  void RequireBool(absl::string_view key, bool served) {
    if (Bool(key, served) != served && status_.ok()) {
      Fail(Unsupported(Path(key),
                       absl::StrCat("only ", served ? "true" : "false", " is supported")));
    }
  }

 private:
  const JsonValue& object_;
  std::string prefix_;
  absl::Status status_;
};

absl::StatusOr<ModelType> ParseModelType(FieldReader& fields) {
  const std::string name = fields.Text("model_type");
  RETURN_IF_ERROR(fields.status());
  for (const ModelType type :
       {ModelType::kDeepseekV2, ModelType::kDeepseekV3, ModelType::kKimiK2}) {
    if (name == Name(type)) return type;
  }
  return Unsupported(
      "model_type",
      absl::StrCat("\"", name.substr(0, 64),
                   "\" is not supported; this build serves deepseek_v2 (V2, V2-Lite), "
                   "deepseek_v3 (V3, R1, V3.1, Moonlight) and kimi_k2"));
}

// One dict of rope settings: the value of rope_scaling, or rope_parameters (which also holds
// rope_theta). nullopt means plain rotary embedding.
absl::StatusOr<std::optional<YarnScaling>> ParseRopeScaling(const JsonValue& value,
                                                            absl::string_view field) {
  if (value.AsObject() == nullptr) {
    return Bad(field, absl::StrCat("is ", value.KindName(), ", expected an object"));
  }
  FieldReader fields(value, absl::StrCat(field, "."));
  // Older files say "type", newer ones "rope_type"; some say both.
  const std::string type = fields.Text("rope_type", fields.Text("type", "default"));
  if (fields.Find("type") != nullptr && fields.Text("type") != type) {
    return Bad(absl::StrCat(field, ".type"), "contradicts rope_type");
  }
  RETURN_IF_ERROR(fields.status());
  if (type == "default") return std::optional<YarnScaling>();
  if (type != "yarn") {
    return Unsupported(absl::StrCat(field, ".rope_type"),
                       absl::StrCat("\"", type.substr(0, 64), "\" is not supported, only yarn"));
  }
  YarnScaling yarn;
  yarn.factor = fields.Number("factor", 1.0, 65536.0);
  yarn.original_max_position_embeddings =
      fields.Int("original_max_position_embeddings", 1, kMaxPositions);
  yarn.beta_fast = fields.Number("beta_fast", 1e-3, 65536.0, 32.0);
  yarn.beta_slow = fields.Number("beta_slow", 1e-3, 65536.0, 1.0);
  yarn.mscale = fields.Number("mscale", 1e-3, 100.0, 1.0);
  yarn.mscale_all_dim = fields.Number("mscale_all_dim", 0.0, 100.0, 0.0);
  fields.RequireBool("truncate", true);
  if (fields.Find("attention_factor") != nullptr) {
    fields.Fail(Unsupported(fields.Path("attention_factor"),
                            "an explicit factor is not supported, only mscale / mscale_all_dim"));
  }
  RETURN_IF_ERROR(fields.status());
  return std::optional<YarnScaling>(yarn);
}

absl::Status ParseRope(FieldReader& fields, ModelConfig& config) {
  fields.RequireBool("rope_interleave", true);
  config.rope_theta = fields.Number("rope_theta", 1.5, 1e12, 10000.0);
  RETURN_IF_ERROR(fields.status());
  if (const JsonValue* scaling = fields.Find("rope_scaling")) {
    ASSIGN_OR_RETURN(config.rope_scaling, ParseRopeScaling(*scaling, "rope_scaling"));
  }
  if (const JsonValue* parameters = fields.Find("rope_parameters")) {
    ASSIGN_OR_RETURN(const std::optional<YarnScaling> yarn,
                     ParseRopeScaling(*parameters, "rope_parameters"));
    if (fields.Find("rope_scaling") != nullptr && yarn != config.rope_scaling) {
      return Bad("rope_parameters", "contradicts rope_scaling");
    }
    config.rope_scaling = yarn;
    FieldReader inner(*parameters, "rope_parameters.");
    const double theta = inner.Number("rope_theta", 1.5, 1e12, config.rope_theta);
    RETURN_IF_ERROR(inner.status());
    if (fields.Find("rope_theta") != nullptr && theta != config.rope_theta) {
      return Bad("rope_parameters.rope_theta", "contradicts rope_theta");
    }
    config.rope_theta = theta;
  }
  return absl::OkStatus();
}

absl::Status ParseAttention(FieldReader& fields, ModelConfig& config) {
  config.num_attention_heads = fields.Int("num_attention_heads", 1, 4096);
  const int64_t key_value_heads =
      fields.Int("num_key_value_heads", 1, 4096, config.num_attention_heads);
  if (fields.status().ok() && key_value_heads != config.num_attention_heads) {
    fields.Fail(Unsupported("num_key_value_heads",
                            "latent attention needs it to equal num_attention_heads"));
  }
  if (fields.Find("q_lora_rank") != nullptr) {
    config.q_lora_rank = fields.Int("q_lora_rank", 1, kMaxSize);
  }
  config.kv_lora_rank = fields.Int("kv_lora_rank", 1, kMaxSize);
  config.qk_nope_head_dim = fields.Int("qk_nope_head_dim", 1, 65536);
  config.qk_rope_head_dim = fields.Int("qk_rope_head_dim", 2, 65536);
  config.v_head_dim = fields.Int("v_head_dim", 1, 65536);
  if (config.qk_rope_head_dim % 2 != 0) {
    fields.Fail(Bad("qk_rope_head_dim", "must be even: it is rotated in pairs"));
  }
  fields.RequireBool("attention_bias", false);
  RETURN_IF_ERROR(fields.status());
  return ParseRope(fields, config);
}

absl::Status ParseExperts(FieldReader& fields, ModelConfig& config) {
  config.n_routed_experts = fields.Int("n_routed_experts", 0, kMaxRoutedExperts, 0);
  RETURN_IF_ERROR(fields.status());
  if (config.n_routed_experts == 0) {
    config.first_k_dense_replace = config.num_hidden_layers;
    return absl::OkStatus();
  }
  const bool is_v2 = config.model_type == ModelType::kDeepseekV2;
  config.moe_intermediate_size = fields.Int("moe_intermediate_size", 1, kMaxSize);
  config.n_shared_experts = fields.Int("n_shared_experts", 0, 1024, 0);
  config.num_experts_per_tok =
      fields.Int("num_experts_per_tok", 1, std::min(config.n_routed_experts, kMaxExpertsPerToken));
  config.first_k_dense_replace = fields.Int("first_k_dense_replace", 0, config.num_hidden_layers);
  config.moe_layer_freq = fields.Int("moe_layer_freq", 1, kMaxSize, 1);
  // The V3 class's defaults for these are V3's own values; a file that leaves them out may mean any
  // model, so only V2's harmless defaults (no groups, no scaling) are taken over.
  const auto v2_default = [&](auto value) { return is_v2 ? std::optional(value) : std::nullopt; };
  config.n_group = fields.Int("n_group", 1, config.n_routed_experts, v2_default(int64_t{1}));
  config.topk_group = fields.Int("topk_group", 1, config.n_group, v2_default(int64_t{1}));
  config.norm_topk_prob = fields.Bool("norm_topk_prob", v2_default(false));
  config.routed_scaling_factor = fields.Number("routed_scaling_factor", 1e-6, 1e6, v2_default(1.0));

  const std::string scoring = fields.Text("scoring_func", is_v2 ? "softmax" : "sigmoid");
  const std::string method = fields.Text("topk_method", is_v2 ? "greedy" : "noaux_tc");
  RETURN_IF_ERROR(fields.status());
  if (scoring == Name(ScoringFunc::kSoftmax)) {
    config.scoring_func = ScoringFunc::kSoftmax;
  } else if (scoring == Name(ScoringFunc::kSigmoid)) {
    config.scoring_func = ScoringFunc::kSigmoid;
  } else {
    return Unsupported(
        "scoring_func",
        absl::StrCat("\"", scoring.substr(0, 64), "\" is not supported, only softmax and sigmoid"));
  }
  if (method == Name(TopkMethod::kGreedy)) {
    config.topk_method = TopkMethod::kGreedy;
  } else if (method == Name(TopkMethod::kGroupLimitedGreedy)) {
    config.topk_method = TopkMethod::kGroupLimitedGreedy;
  } else if (method == Name(TopkMethod::kNoauxTc)) {
    config.topk_method = TopkMethod::kNoauxTc;
  } else {
    return Unsupported("topk_method",
                       absl::StrCat("\"", method.substr(0, 64),
                                    "\" is not supported, only greedy, group_limited_greedy and "
                                    "noaux_tc"));
  }
  // Biased selection is defined on sigmoid scores, the V2 methods on softmax ones.
  const bool biased = config.topk_method == TopkMethod::kNoauxTc;
  if (biased != (config.scoring_func == ScoringFunc::kSigmoid)) {
    return Unsupported("topk_method",
                       absl::StrCat(method, " with scoring_func ", scoring, " is not supported"));
  }
  if (config.n_routed_experts % config.n_group != 0) {
    return Bad("n_group", "does not divide n_routed_experts");
  }
  const int64_t experts_per_group = config.n_routed_experts / config.n_group;
  if (config.topk_method != TopkMethod::kGreedy &&
      config.num_experts_per_tok > experts_per_group * config.topk_group) {
    return Bad("num_experts_per_tok", "more than topk_group groups hold");
  }
  if (biased && config.n_group > 1 && experts_per_group < 2) {
    return Bad("n_group", "a group needs two experts: its score is the sum of its two best");
  }
  return absl::OkStatus();
}

absl::Status ParseQuantization(FieldReader& fields, ModelConfig& config) {
  const JsonValue* value = fields.Find("quantization_config");
  if (value == nullptr) return absl::OkStatus();
  if (value->AsObject() == nullptr) {
    return Bad("quantization_config",
               absl::StrCat("is ", value->KindName(), ", expected an object"));
  }
  FieldReader inner(*value, "quantization_config.");
  const std::string method = inner.Text("quant_method");
  RETURN_IF_ERROR(inner.status());
  if (method != "fp8") {
    return Unsupported("quantization_config.quant_method",
                       absl::StrCat("\"", method.substr(0, 64), "\" is not supported, only fp8"));
  }
  inner.RequireText("fmt", "e4m3");
  inner.RequireText("activation_scheme", "dynamic");
  const JsonValue* block = inner.Find("weight_block_size");
  const JsonValue::Array* sizes = block == nullptr ? nullptr : block->AsArray();
  const auto is_128 = [](const JsonValue& v) { return v.AsUint() && *v.AsUint() == 128; };
  if (sizes == nullptr || sizes->size() != 2 || !is_128((*sizes)[0]) || !is_128((*sizes)[1])) {
    inner.Fail(
        Unsupported("quantization_config.weight_block_size", "only [128, 128] is supported"));
  }
  Fp8Quantization quantization;
  const std::string scale_format = inner.Text("scale_fmt", "float");
  if (scale_format == "ue8m0") {
    quantization.power_of_two_scales = true;
  } else if (scale_format != "float") {
    inner.Fail(Unsupported("quantization_config.scale_fmt",
                           absl::StrCat("\"", scale_format.substr(0, 64),
                                        "\" is not supported, only float and ue8m0")));
  }
  RETURN_IF_ERROR(inner.status());
  config.quantization = quantization;
  return absl::OkStatus();
}

// A token id, a list of them, or absent / null.
absl::Status ParseTokenIds(const JsonValue* value, absl::string_view field, int64_t vocab_size,
                           std::vector<TokenId>& out) {
  if (value == nullptr || value->is_null()) return absl::OkStatus();
  const auto add = [&](const JsonValue& element) {
    const uint64_t* number = element.AsUint();
    if (number == nullptr || *number >= static_cast<uint64_t>(vocab_size)) {
      return Bad(field, absl::StrCat("expected token ids below vocab_size ", vocab_size));
    }
    out.push_back(static_cast<TokenId>(*number));
    return absl::OkStatus();
  };
  if (const JsonValue::Array* list = value->AsArray()) {
    for (const JsonValue& element : *list) RETURN_IF_ERROR(add(element));
    return absl::OkStatus();
  }
  return add(*value);
}

void SortUnique(std::vector<TokenId>& ids) {
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
}

}  // namespace

const char* Name(ModelType type) {
  switch (type) {
    case ModelType::kDeepseekV2:
      return "deepseek_v2";
    case ModelType::kDeepseekV3:
      return "deepseek_v3";
    case ModelType::kKimiK2:
      return "kimi_k2";
  }
  return "?";
}

const char* Name(ScoringFunc scoring_func) {
  return scoring_func == ScoringFunc::kSoftmax ? "softmax" : "sigmoid";
}

const char* Name(TopkMethod method) {
  switch (method) {
    case TopkMethod::kGreedy:
      return "greedy";
    case TopkMethod::kGroupLimitedGreedy:
      return "group_limited_greedy";
    case TopkMethod::kNoauxTc:
      return "noaux_tc";
  }
  return "?";
}

const char* Name(WireDtype dtype) { return dtype == WireDtype::kE4m3 ? "e4m3" : "bf16"; }

bool ModelConfig::is_moe_layer(int64_t layer) const {
  if (n_routed_experts == 0) return false;
  if (is_mtp_layer(layer)) return true;
  return layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
}

double ModelConfig::softmax_scale() const {
  const double scale = 1.0 / std::sqrt(static_cast<double>(qk_head_dim()));
  if (!rope_scaling || rope_scaling->mscale_all_dim == 0) return scale;
  const double m = YarnMscale(rope_scaling->factor, rope_scaling->mscale_all_dim);
  return scale * m * m;
}

absl::StatusOr<ModelConfig> ParseConfig(absl::string_view json) {
  ASSIGN_OR_RETURN(const JsonValue root, ParseJson(json));
  if (root.AsObject() == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("config: is ", root.KindName(), ", expected an object"));
  }
  FieldReader fields(root, "");
  ModelConfig config;
  ASSIGN_OR_RETURN(config.model_type, ParseModelType(fields));
  config.vocab_size = fields.Int("vocab_size", 1, kMaxVocab);
  config.hidden_size = fields.Int("hidden_size", 1, kMaxSize);
  config.intermediate_size = fields.Int("intermediate_size", 1, kMaxSize);
  config.num_hidden_layers = fields.Int("num_hidden_layers", 1, 4096);
  config.num_nextn_predict_layers = fields.Int("num_nextn_predict_layers", 0, 16, 0);
  config.max_position_embeddings = fields.Int("max_position_embeddings", 1, kMaxPositions);
  config.rms_norm_eps = fields.Number("rms_norm_eps", 1e-12, 1.0, 1e-6);
  config.tie_word_embeddings = fields.Bool("tie_word_embeddings", false);
  fields.RequireText("hidden_act", "silu");
  RETURN_IF_ERROR(fields.status());
  RETURN_IF_ERROR(ParseAttention(fields, config));
  RETURN_IF_ERROR(ParseExperts(fields, config));
  RETURN_IF_ERROR(ParseQuantization(fields, config));

  std::vector<TokenId> bos;
  RETURN_IF_ERROR(ParseTokenIds(root.Find("bos_token_id"), "bos_token_id", config.vocab_size, bos));
  if (bos.size() > 1) return Bad("bos_token_id", "expected one token id");
  if (!bos.empty()) config.bos_token_id = bos[0];
  RETURN_IF_ERROR(ParseTokenIds(root.Find("eos_token_id"), "eos_token_id", config.vocab_size,
                                config.eos_token_id));
  SortUnique(config.eos_token_id);
  return config;
}

absl::Status MergeGenerationConfig(absl::string_view json, ModelConfig& config) {
  ASSIGN_OR_RETURN(const JsonValue root, ParseJson(json));
  if (root.AsObject() == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("generation config: is ", root.KindName(), ", expected an object"));
  }
  RETURN_IF_ERROR(ParseTokenIds(root.Find("eos_token_id"), "eos_token_id", config.vocab_size,
                                config.eos_token_id));
  SortUnique(config.eos_token_id);
  return absl::OkStatus();
}

absl::StatusOr<ModelConfig> LoadConfig(const std::string& dir) {
  const std::string path = absl::StrCat(dir, "/config.json");
  ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxConfigBytes));
  absl::StatusOr<ModelConfig> config = ParseConfig(text);
  if (!config.ok()) return Annotate(config.status(), path);
  const std::string generation_path = absl::StrCat(dir, "/generation_config.json");
  if (FileExists(generation_path)) {
    ASSIGN_OR_RETURN(const std::string generation, ReadSmallFile(generation_path, kMaxConfigBytes));
    const absl::Status status = MergeGenerationConfig(generation, *config);
    if (!status.ok()) return Annotate(status, generation_path);
  }
  return config;
}

}  // namespace moebius::model
