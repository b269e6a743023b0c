// Goal: the report's sums are right on a tiny model, and on the complete DeepSeek-V3 they equal the
// published totals. Method: a header with all 91,991 tensors of V3 before a sparse data buffer.

#include "model/inspect.h"

#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/model/test_dir.h"
#include "tests/model/tiny_checkpoint.h"

namespace moebius::model {
namespace {

TEST(Inspect, SumsOfATinyModel) {
  const std::string dir = TestDir() + "/moebius_inspect_tiny";
  WriteTinyCheckpoint(dir, {.mtp_copies = true, .shards = 2});
  const auto checkpoint = Checkpoint::Open(dir);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const ModelReport r = InspectModel(**checkpoint, *LoadConfig(dir));
  EXPECT_EQ(r.files, 2);
  EXPECT_EQ(r.moe_layers, 3);
  EXPECT_EQ(r.expert_bytes, 3 * (130 * 160 + 4 * 4));
  EXPECT_EQ(r.all_experts_bytes, 3 * 8 * r.expert_bytes);
  EXPECT_EQ(r.gate_bytes, 3 * (8 * 160 * 2 + 8 * 4));
  EXPECT_EQ(r.ignored_bytes, 2 * 96 * 160 * 2);
  EXPECT_EQ(r.latent_cache_bytes_per_token, 4 * (136 + 16) * 2);
  EXPECT_EQ(r.parameters - r.activated_parameters, 2 * 5 * 3 * 130 * 160);
  int64_t bytes = 0;
  for (const auto& [name, type] : r.types) bytes += type.bytes;
  EXPECT_EQ(bytes, r.attention_worker_bytes + r.all_experts_bytes + r.ignored_bytes);
  EXPECT_TRUE(absl::StrContains(FormatReport(r), "8 routed, 3 chosen"));
  EXPECT_TRUE(absl::StrContains(ReportToJson(r), absl::StrCat("\"parameters\": ", r.parameters)));
}

// Header of a complete DeepSeek-V3 in FP8, tensor by tensor as published.
class V3Header {
 public:
  V3Header() {
    Add("model.embed_tokens.weight", "BF16", {129280, 7168});
    Add("model.norm.weight", "BF16", {7168});
    Add("lm_head.weight", "BF16", {129280, 7168});
    for (int layer = 0; layer <= 61; ++layer) Layer(layer);
  }
  int tensors() const { return tensors_; }
  uint64_t data_bytes() const { return offset_; }
  std::string Json() const { return json_ + "}"; }

 private:
  void Add(const std::string& name, const char* dtype, const std::vector<int64_t>& shape) {
    uint64_t bytes = dtype[0] == 'B' ? 2 : dtype[1] == '3' ? 4 : 1;
    for (const int64_t dimension : shape) bytes *= static_cast<uint64_t>(dimension);
    absl::StrAppend(&json_, tensors_ == 0 ? "" : ",", "\"", name, "\":{\"dtype\":\"", dtype,
                    "\",\"shape\":[", shape[0], shape.size() > 1 ? absl::StrCat(",", shape[1]) : "",
                    "],\"data_offsets\":[", offset_, ",", offset_ + bytes, "]}");
    offset_ += bytes;
    ++tensors_;
  }
  void Fp8(const std::string& name, int64_t rows, int64_t cols) {
    Add(name + ".weight", "F8_E4M3", {rows, cols});
    Add(name + ".weight_scale_inv", "F32", {(rows + 127) / 128, (cols + 127) / 128});
  }
  void Mlp(const std::string& prefix, int64_t width) {
    Fp8(prefix + "gate_proj", width, 7168);
    Fp8(prefix + "up_proj", width, 7168);
    Fp8(prefix + "down_proj", 7168, width);
  }
  void Layer(int layer) {
    const std::string p = absl::StrCat("model.layers.", layer, ".");
    Add(p + "input_layernorm.weight", "BF16", {7168});
    Add(p + "post_attention_layernorm.weight", "BF16", {7168});
    Fp8(p + "self_attn.q_a_proj", 1536, 7168);
    Add(p + "self_attn.q_a_layernorm.weight", "BF16", {1536});
    Fp8(p + "self_attn.q_b_proj", 24576, 1536);
    Fp8(p + "self_attn.kv_a_proj_with_mqa", 576, 7168);
    Add(p + "self_attn.kv_a_layernorm.weight", "BF16", {512});
    Fp8(p + "self_attn.kv_b_proj", 32768, 512);
    Fp8(p + "self_attn.o_proj", 7168, 16384);
    if (layer < 3) {
      Mlp(p + "mlp.", 18432);
      return;
    }
    Add(p + "mlp.gate.weight", "BF16", {256, 7168});
    Add(p + "mlp.gate.e_score_correction_bias", "F32", {256});
    Mlp(p + "mlp.shared_experts.", 2048);
    for (int e = 0; e < 256; ++e) Mlp(absl::StrCat(p, "mlp.experts.", e, "."), 2048);
    if (layer < 61) return;
    Add(p + "embed_tokens.weight", "BF16", {129280, 7168});
    Add(p + "enorm.weight", "BF16", {7168});
    Add(p + "hnorm.weight", "BF16", {7168});
    Add(p + "eh_proj.weight", "BF16", {7168, 14336});
    Add(p + "shared_head.norm.weight", "BF16", {7168});
    Add(p + "shared_head.head.weight", "BF16", {129280, 7168});
  }
  std::string json_ = "{";
  uint64_t offset_ = 0;
  int tensors_ = 0;
};

TEST(Inspect, DeepSeekV3HasThePublishedTotals) {
  const V3Header header;
  EXPECT_EQ(header.tensors(), 91'991);
  EXPECT_EQ(header.data_bytes(), 688'574'839'360u);

  const std::string dir = TestDir() + "/moebius_inspect_v3";
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  const std::string json = header.Json();
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(uint64_t{json.size()} >> (8 * i));
  WriteTextFile(dir + "/model.safetensors", length + json);
  std::error_code error;
  std::filesystem::resize_file(dir + "/model.safetensors", 8 + json.size() + header.data_bytes(),
                               error);
  if (error) GTEST_SKIP() << "no sparse file of 689 GB here: " << error.message();
  WriteTextFile(dir + "/config.json", R"({"model_type": "deepseek_v3", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "norm_topk_prob": true,
    "routed_scaling_factor": 2.5, "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]}})");
  const auto config = LoadConfig(dir);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto checkpoint = Checkpoint::Open(dir);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const ModelReport r = InspectModel(**checkpoint, *config);
  EXPECT_EQ(r.tensors, 91'991);
  EXPECT_EQ(r.parameters, 671'026'419'200);
  EXPECT_EQ(r.expert_bytes, 44'050'944);
  EXPECT_EQ(r.all_experts_bytes, 59 * int64_t{11'277'041'664});
  EXPECT_NEAR(r.activated_parameters, 37.5e9, 0.2e9);  // 0.93 B of it the embedding
  EXPECT_NEAR(r.mtp_parameters, 11.6e9, 0.1e9);
  EXPECT_EQ(r.latent_cache_bytes_per_token, 71'424);
  EXPECT_EQ(r.moe_layers, 59);
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace moebius::model
