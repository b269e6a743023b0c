#include "tests/model/tiny_checkpoint.h"

#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/float_formats.h"
#include "base/hash.h"
#include "base/prng.h"
#include "base/tensor_view.h"
#include "model/json_value.h"

namespace moebius::model {
namespace {

constexpr int64_t kVocab = 96, kHidden = 160, kLayers = 3, kHeads = 4, kNope = 24, kRope = 16,
                  kV = 32, kQLora = 144, kKvLora = 136, kIntermediate = 200, kMoeIntermediate = 130,
                  kExperts = 8;

class TensorMaker {
 public:
  TensorMaker(const TinyOptions& options, std::map<std::string, TinyTensor>& out)
      : options_(options), out_(out) {}

  void Add(const std::string& name, TensorDType dtype, std::vector<int64_t> shape, float low,
           float high) {
    TinyTensor tensor{{name, dtype, shape}, {}};
    int64_t count = 1;
    for (const int64_t dimension : shape) count *= dimension;
    // Seeded by name, so that the order of creation does not matter.
    Prng prng(Hash64(name.data(), name.size(), options_.seed));
    for (int64_t i = 0; i < count; ++i) {
      const float value = low + (high - low) * prng.Unit();
      if (dtype == TensorDType::kF32) {
        Push(tensor.data, value);
      } else if (dtype == TensorDType::kBf16) {
        Push(tensor.data, ToBf16(value));
      } else {
        Push(tensor.data, ToE4m3(value));
      }
    }
    out_[name] = std::move(tensor);
  }
  void Norm(const std::string& name, int64_t size) {
    Add(name, TensorDType::kBf16, {size}, 0.5f, 1.5f);
  }
  void Plain(const std::string& name, int64_t rows, int64_t cols) {
    Add(name, TensorDType::kBf16, {rows, cols}, -0.2f, 0.2f);
  }
  void Linear(const std::string& name, int64_t rows, int64_t cols) {
    if (!options_.fp8) return Plain(name, rows, cols);
    Add(name, TensorDType::kF8E4m3, {rows, cols}, -400.0f, 400.0f);
    Add(name + "_scale_inv", TensorDType::kF32,
        {CeilDiv(rows, kQuantBlock), CeilDiv(cols, kQuantBlock)}, 3e-4f, 6e-4f);
  }
  void Mlp(const std::string& prefix, int64_t intermediate) {
    Linear(prefix + "gate_proj.weight", intermediate, kHidden);
    Linear(prefix + "up_proj.weight", intermediate, kHidden);
    Linear(prefix + "down_proj.weight", kHidden, intermediate);
  }
  void Layer(int64_t layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const std::string attention = prefix + "self_attn.";
    Norm(prefix + "input_layernorm.weight", kHidden);
    Norm(prefix + "post_attention_layernorm.weight", kHidden);
    if (options_.q_lora) {
      Linear(attention + "q_a_proj.weight", kQLora, kHidden);
      Norm(attention + "q_a_layernorm.weight", kQLora);
      Linear(attention + "q_b_proj.weight", kHeads * (kNope + kRope), kQLora);
    } else {
      Linear(attention + "q_proj.weight", kHeads * (kNope + kRope), kHidden);
    }
    Linear(attention + "kv_a_proj_with_mqa.weight", kKvLora + kRope, kHidden);
    Norm(attention + "kv_a_layernorm.weight", kKvLora);
    Linear(attention + "kv_b_proj.weight", kHeads * (kNope + kV), kKvLora);
    Linear(attention + "o_proj.weight", kHidden, kHeads * kV);
    if (layer == 0) {
      Mlp(prefix + "mlp.", kIntermediate);
      return;
    }
    Plain(prefix + "mlp.gate.weight", kExperts, kHidden);
    Add(prefix + "mlp.gate.e_score_correction_bias", TensorDType::kF32, {kExperts}, 0.0f, 0.1f);
    Mlp(prefix + "mlp.shared_experts.", kMoeIntermediate);
    for (int64_t expert = 0; expert < kExperts; ++expert) {
      Mlp(absl::StrCat(prefix, "mlp.experts.", expert, "."), kMoeIntermediate);
    }
  }

 private:
  template <typename T>
  static void Push(std::vector<std::byte>& data, T value) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
    data.insert(data.end(), bytes, bytes + sizeof(T));
  }
  const TinyOptions& options_;
  std::map<std::string, TinyTensor>& out_;
};

void WriteShard(const std::string& path, const std::vector<const TinyTensor*>& tensors) {
  std::map<std::string, const TinyTensor*> by_name;
  std::vector<TensorSpec> specs;
  for (const TinyTensor* tensor : tensors) {
    specs.push_back(tensor->spec);
    by_name[tensor->spec.name] = tensor;
  }
  absl::StatusOr<SafetensorsWriter> writer = SafetensorsWriter::Create(path, std::move(specs));
  CHECK(writer.ok());
  for (const TensorInfo& info : writer->layout()) {
    CHECK(writer->Append(info.name, by_name.at(info.name)->data).ok());
  }
  CHECK(writer->Finish().ok());
}

}  // namespace

std::string TinyConfigJson(const TinyOptions& options) {
  return absl::StrCat(
      R"({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": )",
      kVocab, R"(, "hidden_size": )", kHidden, R"(, "intermediate_size": )", kIntermediate,
      R"(, "moe_intermediate_size": )", kMoeIntermediate, R"(, "num_hidden_layers": )", kLayers,
      R"(, "num_nextn_predict_layers": )", options.mtp ? 1 : 0, R"(, "num_attention_heads": )",
      kHeads, R"(, "num_key_value_heads": )", kHeads, R"(, "q_lora_rank": )",
      options.q_lora ? absl::StrCat(kQLora) : "null", R"(, "kv_lora_rank": )", kKvLora,
      R"(, "qk_nope_head_dim": )", kNope, R"(, "qk_rope_head_dim": )", kRope, R"(, "v_head_dim": )",
      kV, R"(, "n_routed_experts": )", kExperts,
      R"(, "n_shared_experts": 1, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
 "moe_layer_freq": 1, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc",
 "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
 "hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_theta": 10000,
 "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64,
  "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
 "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16")",
      options.fp8 ? R"(, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
  "activation_scheme": "dynamic", "weight_block_size": [128, 128]})"
                  : "",
      "}");
}

std::map<std::string, TinyTensor> TinyTensors(const TinyOptions& options) {
  std::map<std::string, TinyTensor> tensors;
  TensorMaker make(options, tensors);
  make.Plain("model.embed_tokens.weight", kVocab, kHidden);
  for (int64_t layer = 0; layer < kLayers; ++layer) make.Layer(layer);
  make.Norm("model.norm.weight", kHidden);
  make.Plain("lm_head.weight", kVocab, kHidden);
  if (options.mtp) {
    const std::string prefix = absl::StrCat("model.layers.", kLayers, ".");
    make.Layer(kLayers);
    make.Norm(prefix + "enorm.weight", kHidden);
    make.Norm(prefix + "hnorm.weight", kHidden);
    make.Plain(prefix + "eh_proj.weight", kHidden, 2 * kHidden);
    make.Norm(prefix + "shared_head.norm.weight", kHidden);
    if (options.mtp_copies) {
      make.Plain(prefix + "embed_tokens.weight", kVocab, kHidden);
      make.Plain(prefix + "shared_head.head.weight", kVocab, kHidden);
    }
  }
  return tensors;
}

void WriteTinyTensors(const std::string& dir, const TinyOptions& options,
                      const std::map<std::string, TinyTensor>& tensors) {
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  WriteTextFile(dir + "/config.json", TinyConfigJson(options));
  std::vector<std::vector<const TinyTensor*>> shards(options.shards);
  JsonValue::Object weight_map;
  size_t next = 0;
  for (const auto& [name, tensor] : tensors) {
    const size_t shard = next++ % shards.size();
    shards[shard].push_back(&tensor);
    weight_map.emplace_back(name, JsonValue::OfString(absl::StrFormat(
                                      "model-%05d-of-%06d.safetensors", shard + 1, shards.size())));
  }
  if (options.shards == 1) {
    WriteShard(dir + "/model.safetensors", shards[0]);
    return;
  }
  for (size_t shard = 0; shard < shards.size(); ++shard) {
    WriteShard(dir + absl::StrFormat("/model-%05d-of-%06d.safetensors", shard + 1, shards.size()),
               shards[shard]);
  }
  JsonValue::Object index;
  index.emplace_back("metadata", JsonValue::OfObject({}));
  index.emplace_back("weight_map", JsonValue::OfObject(std::move(weight_map)));
  WriteTextFile(dir + "/model.safetensors.index.json",
                WriteJson(JsonValue::OfObject(std::move(index)), 2));
}

void WriteTinyCheckpoint(const std::string& dir, const TinyOptions& options) {
  WriteTinyTensors(dir, options, TinyTensors(options));
}

void WriteTextFile(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

}  // namespace moebius::model
