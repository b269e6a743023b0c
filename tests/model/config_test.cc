// Goal: every published model of the family is read with the values of its config.json and the
// derived numbers of the DeepSeek model code; anything we would compute wrongly is refused with the
// name of the field. Method: the published field values as JSON, then single edits of them.

#include "model/config.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"
#include "model/rope.h"
#include "tests/model/test_dir.h"

namespace moebius::model {
namespace {

constexpr char kV3[] = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
  "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
  "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
  "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
  "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
  "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
  "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                   "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
  "v_head_dim": 128, "vocab_size": 129280})";

constexpr char kV2Lite[] = R"({
  "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
  "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
  "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": null, "kv_lora_rank": 512,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
  "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
  "moe_layer_freq": 1, "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1,
  "topk_group": 1, "norm_topk_prob": false, "routed_scaling_factor": 1.0, "hidden_act": "silu",
  "rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 0.707,
    "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 4096},
  "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "bos_token_id": 100000,
  "eos_token_id": 100001, "tie_word_embeddings": false, "torch_dtype": "bfloat16"})";

std::string Edit(std::string json, const std::string& from, const std::string& to) {
  EXPECT_TRUE(absl::StrContains(json, from)) << from;
  return absl::StrReplaceAll(json, {{from, to}});
}

std::string Error(const std::string& json) {
  const absl::StatusOr<ModelConfig> config = ParseConfig(json);
  return config.ok() ? "OK" : std::string(config.status().message());
}

TEST(Config, ReadsDeepSeekV3) {
  const absl::StatusOr<ModelConfig> parsed = ParseConfig(kV3);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const ModelConfig& c = *parsed;
  EXPECT_EQ(c.model_type, ModelType::kDeepseekV3);
  EXPECT_EQ(c.vocab_size, 129280);
  EXPECT_EQ(c.hidden_size, 7168);
  EXPECT_EQ(c.intermediate_size, 18432);
  EXPECT_EQ(c.moe_intermediate_size, 2048);
  EXPECT_EQ(c.num_hidden_layers, 61);
  EXPECT_EQ(c.num_nextn_predict_layers, 1);
  EXPECT_EQ(c.num_attention_heads, 128);
  EXPECT_EQ(c.q_lora_rank, 1536);
  EXPECT_EQ(c.kv_lora_rank, 512);
  EXPECT_EQ(c.n_routed_experts, 256);
  EXPECT_EQ(c.n_shared_experts, 1);
  EXPECT_EQ(c.num_experts_per_tok, 8);
  EXPECT_EQ(c.n_group, 8);
  EXPECT_EQ(c.topk_group, 4);
  EXPECT_EQ(c.scoring_func, ScoringFunc::kSigmoid);
  EXPECT_EQ(c.topk_method, TopkMethod::kNoauxTc);
  EXPECT_TRUE(c.norm_topk_prob);
  EXPECT_EQ(c.routed_scaling_factor, 2.5);
  EXPECT_EQ(c.bos_token_id, 0);
  EXPECT_EQ(c.eos_token_id, std::vector<TokenId>{1});
  EXPECT_EQ(c.rope_scaling->factor, 40);
  EXPECT_EQ(c.wire_dtype(), WireDtype::kE4m3);
  EXPECT_FALSE(c.quantization->power_of_two_scales);
  EXPECT_EQ(c.qk_head_dim(), 192);
  EXPECT_EQ(c.latent_dim(), 576);
  EXPECT_EQ(c.total_layers(), 62);
  EXPECT_FALSE(c.is_moe_layer(2));
  EXPECT_TRUE(c.is_moe_layer(3));
  EXPECT_TRUE(c.is_moe_layer(61));
  EXPECT_TRUE(c.is_mtp_layer(61));
  EXPECT_FALSE(c.is_mtp_layer(60));
  EXPECT_NEAR(c.softmax_scale(), 0.1352337788608801, 1e-15);
  EXPECT_EQ(RopeCosSinMultiplier(c), 1.0);
}

TEST(Config, YarnFrequenciesOfV3EqualThePublishedTable) {
  const ModelConfig c = *ParseConfig(kV3);
  const std::vector<double> expected = {1,
                                        0.749894209,
                                        0.562341325,
                                        0.421696503,
                                        0.316227766,
                                        0.237137371,
                                        0.177827941,
                                        0.133352143,
                                        0.1,
                                        0.0749894209,
                                        0.0562341325,
                                        0.0390069266,
                                        0.0268793601,
                                        0.0183781462,
                                        0.0124479559,
                                        0.00833450895,
                                        0.0055,
                                        0.00356199749,
                                        0.0022493653,
                                        0.00137051364,
                                        0.000790569415,
                                        0.000414990398,
                                        0.000177827941,
                                        3.33380358e-05,
                                        2.5e-05,
                                        1.87473552e-05,
                                        1.40585331e-05,
                                        1.05424126e-05,
                                        7.90569415e-06,
                                        5.92843426e-06,
                                        4.44569853e-06,
                                        3.33380358e-06};
  const std::vector<float> actual = RopeInvFreq(c);
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    // A few F32 roundings; the ramp's cancellation near its ends costs a little more.
    EXPECT_NEAR(actual[i], expected[i], 1e-6 * expected[i]) << "pair " << i;
  }
}

TEST(Config, CosSinTableRotatesByPositionTimesFrequency) {
  const ModelConfig c = *ParseConfig(kV3);
  const std::vector<float> table = RopeCosSinTable(c, 3);
  ASSERT_EQ(table.size(), 3u * 32 * 2);
  EXPECT_EQ(table[0], 1.0f);
  EXPECT_EQ(table[1], 0.0f);
  EXPECT_FLOAT_EQ(table[2 * 64], std::cos(2.0f));
  EXPECT_FLOAT_EQ(table[2 * 64 + 1], std::sin(2.0f));
  EXPECT_FLOAT_EQ(table[64 + 2], std::cos(0.749894209f));
}

TEST(Config, ReadsV2LiteAndV2) {
  const absl::StatusOr<ModelConfig> lite = ParseConfig(kV2Lite);
  ASSERT_TRUE(lite.ok()) << lite.status();
  EXPECT_EQ(lite->model_type, ModelType::kDeepseekV2);
  EXPECT_FALSE(lite->q_lora_rank.has_value());
  EXPECT_EQ(lite->shared_intermediate_size(), 2816);
  EXPECT_EQ(lite->scoring_func, ScoringFunc::kSoftmax);
  EXPECT_EQ(lite->topk_method, TopkMethod::kGreedy);
  EXPECT_FALSE(lite->norm_topk_prob);
  EXPECT_EQ(lite->wire_dtype(), WireDtype::kBf16);
  EXPECT_NEAR(YarnMscale(40, 0.707), 1.2608037774058554, 1e-15);
  EXPECT_NEAR(lite->softmax_scale(), 0.1147213867929261, 1e-15);
  EXPECT_EQ(RopeCosSinMultiplier(*lite), 1.0);

  std::string v2 = Edit(kV2Lite, "\"greedy\"", "\"group_limited_greedy\"");
  v2 = Edit(v2, "\"n_group\": 1", "\"n_group\": 8");
  v2 = Edit(v2, "\"topk_group\": 1", "\"topk_group\": 3");
  v2 = Edit(v2, "\"routed_scaling_factor\": 1.0", "\"routed_scaling_factor\": 16.0");
  v2 = Edit(v2, "\"n_routed_experts\": 64", "\"n_routed_experts\": 160");
  v2 = Edit(v2, "\"q_lora_rank\": null", "\"q_lora_rank\": 1536");
  const absl::StatusOr<ModelConfig> full = ParseConfig(v2);
  ASSERT_TRUE(full.ok()) << full.status();
  EXPECT_EQ(full->topk_method, TopkMethod::kGroupLimitedGreedy);
  EXPECT_EQ(full->topk_group, 3);
  EXPECT_EQ(full->routed_scaling_factor, 16);
}

TEST(Config, ReadsMoonlightKimiAndV31) {
  std::string moonlight = kV3;
  moonlight = Edit(moonlight,
                   R"("rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                   "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},)",
                   "");
  moonlight = Edit(moonlight, "\"rope_theta\": 10000", "\"rope_theta\": 50000.0");
  moonlight = Edit(moonlight, "\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-05");
  moonlight = Edit(moonlight, "\"n_group\": 8", "\"n_group\": 1");
  moonlight = Edit(moonlight, "\"topk_group\": 4", "\"topk_group\": 1");
  moonlight = Edit(moonlight, "\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 0");
  const absl::StatusOr<ModelConfig> m = ParseConfig(moonlight);
  ASSERT_TRUE(m.ok()) << m.status();
  EXPECT_FALSE(m->rope_scaling.has_value());
  EXPECT_EQ(m->rope_theta, 50000);
  EXPECT_EQ(m->rms_norm_eps, 1e-5);
  EXPECT_EQ(ModelConfig::kLatentNormEps, 1e-6);
  EXPECT_NEAR(m->softmax_scale(), 0.07216878364870322, 1e-16);
  EXPECT_EQ(m->total_layers(), 61);
  EXPECT_NEAR(RopeInvFreq(*m)[1], std::pow(50000.0, -2.0 / 64), 1e-7);

  std::string kimi = Edit(kV3, "\"deepseek_v3\"", "\"kimi_k2\"");
  kimi = Edit(kimi, "\"beta_fast\": 32", "\"beta_fast\": 1");
  kimi = Edit(kimi, "\"factor\": 40", "\"factor\": 32");
  kimi = Edit(kimi, "\"rope_theta\": 10000", "\"rope_theta\": 50000");
  kimi = Edit(kimi, "\"n_routed_experts\": 256", "\"n_routed_experts\": 384");
  kimi = Edit(kimi, "\"eos_token_id\": 1,", "\"eos_token_id\": [1, 7, 7],");
  const absl::StatusOr<ModelConfig> k = ParseConfig(kimi);
  ASSERT_TRUE(k.ok()) << k.status();
  EXPECT_EQ(k->model_type, ModelType::kKimiK2);
  EXPECT_NEAR(YarnMscale(32, 1), 1.3465735902799727, 1e-15);
  EXPECT_NEAR(k->softmax_scale(), 0.13086079996295005, 1e-15);
  EXPECT_EQ(k->eos_token_id, (std::vector<TokenId>{1, 7}));
  // low 19, high 20: pairs up to 19 keep their frequency, pairs from 20 on are divided by 32.
  const std::vector<float> f = RopeInvFreq(*k);
  EXPECT_NEAR(f[19] * std::pow(50000.0, 38.0 / 64), 1.0, 1e-6);
  EXPECT_NEAR(f[20] * std::pow(50000.0, 40.0 / 64), 1.0 / 32, 1e-7);

  const absl::StatusOr<ModelConfig> v31 =
      ParseConfig(Edit(kV3, "\"fmt\": \"e4m3\"", "\"fmt\": \"e4m3\", \"scale_fmt\": \"ue8m0\""));
  ASSERT_TRUE(v31.ok()) << v31.status();
  EXPECT_TRUE(v31->quantization->power_of_two_scales);
}

TEST(Config, BothSpellingsOfRopeSettingsMeanTheSame) {
  const ModelConfig old_spelling = *ParseConfig(kV3);
  const absl::StatusOr<ModelConfig> rope_type =
      ParseConfig(Edit(kV3, "\"type\": \"yarn\"", "\"rope_type\": \"yarn\""));
  ASSERT_TRUE(rope_type.ok()) << rope_type.status();
  EXPECT_EQ(rope_type->rope_scaling, old_spelling.rope_scaling);

  std::string moved = Edit(kV3, "\"rope_theta\": 10000, ", "");
  moved = Edit(moved, "\"rope_scaling\": {", "\"rope_parameters\": {\"rope_theta\": 12345.0, ");
  const absl::StatusOr<ModelConfig> parameters = ParseConfig(moved);
  ASSERT_TRUE(parameters.ok()) << parameters.status();
  EXPECT_EQ(parameters->rope_scaling, old_spelling.rope_scaling);
  EXPECT_EQ(parameters->rope_theta, 12345);

  EXPECT_EQ(Error(Edit(kV3, "\"rope_theta\": 10000",
                       "\"rope_theta\": 10000, \"rope_parameters\": {\"rope_type\": \"default\"}")),
            "config field rope_parameters: contradicts rope_scaling");
  EXPECT_EQ(Error(Edit(moved, "\"hidden_act\"", "\"rope_theta\": 10000, \"hidden_act\"")),
            "config field rope_parameters.rope_theta: contradicts rope_theta");
}

TEST(Config, FieldsThatTransformersOmitsGetItsDefaults) {
  std::string json = kV3;
  for (const char* field : {"\"scoring_func\": \"sigmoid\", ", "\"topk_method\": \"noaux_tc\",",
                            "\"moe_layer_freq\": 1, ", "\"num_nextn_predict_layers\": 1,",
                            "\"tie_word_embeddings\": false, ", "\"use_cache\": true,"}) {
    json = Edit(json, field, "");
  }
  const absl::StatusOr<ModelConfig> c = ParseConfig(json);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->scoring_func, ScoringFunc::kSigmoid);
  EXPECT_EQ(c->topk_method, TopkMethod::kNoauxTc);
  EXPECT_EQ(c->num_nextn_predict_layers, 0);
}

TEST(Config, OtherArchitecturesAreRefusedByModelType) {
  for (const char* type : {"deepseek_v4", "deepseek_v32", "llama", "deepseek", ""}) {
    const absl::StatusOr<ModelConfig> c =
        ParseConfig(Edit(kV3, "\"deepseek_v3\"", absl::StrCat("\"", type, "\"")));
    EXPECT_EQ(c.status().code(), absl::StatusCode::kUnimplemented) << type;
    EXPECT_TRUE(absl::StrContains(c.status().message(), "model_type")) << c.status();
    EXPECT_TRUE(absl::StrContains(c.status().message(), absl::StrCat("\"", type, "\"")));
  }
  EXPECT_EQ(Error("{}"), "config field model_type: missing");
}

TEST(Config, EveryBadFieldIsNamed) {
  struct Case {
    const char* from;
    const char* to;
    const char* field;
  };
  const Case cases[] = {
      {"\"vocab_size\": 129280", "\"vocab_size\": 0", "vocab_size"},
      {"\"vocab_size\": 129280", "\"vocab_size\": 1e5", "vocab_size"},
      {"\"hidden_size\": 7168", "\"hidden_size\": -1", "hidden_size"},
      {"\"hidden_size\": 7168", "\"hidden_size\": \"7168\"", "hidden_size"},
      {"\"hidden_size\": 7168", "\"hidden_size\": 99999999999999999999", "hidden_size"},
      {"\"hidden_size\": 7168", "\"hidden_size\": 7168.0", "hidden_size"},
      {"\"hidden_size\": 7168", "\"hidden_size\": null", "hidden_size"},
      {"\"intermediate_size\": 18432, \"kv", "\"kv", "intermediate_size"},
      {"\"num_hidden_layers\": 61", "\"num_hidden_layers\": 0", "num_hidden_layers"},
      {"\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 99",
       "num_nextn_predict_layers"},
      {"\"max_position_embeddings\": 163840", "\"max_position_embeddings\": 0",
       "max_position_embeddings"},
      {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 0", "rms_norm_eps"},
      {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": \"x\"", "rms_norm_eps"},
      {"\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act"},
      {"\"attention_bias\": false", "\"attention_bias\": true", "attention_bias"},
      {"\"attention_bias\": false", "\"attention_bias\": 0", "attention_bias"},
      {"\"num_key_value_heads\": 128", "\"num_key_value_heads\": 8", "num_key_value_heads"},
      {"\"q_lora_rank\": 1536", "\"q_lora_rank\": 0", "q_lora_rank"},
      {"\"kv_lora_rank\": 512", "\"kv_lora_rank\": 0", "kv_lora_rank"},
      {"\"qk_rope_head_dim\": 64", "\"qk_rope_head_dim\": 63", "qk_rope_head_dim"},
      {"\"rope_theta\": 10000", "\"rope_theta\": 0", "rope_theta"},
      {"\"type\": \"yarn\"", "\"type\": \"linear\"", "rope_scaling.rope_type"},
      {"\"factor\": 40", "\"factor\": 0.5", "rope_scaling.factor"},
      {"\"factor\": 40", "\"attention_factor\": 1.0, \"factor\": 40",
       "rope_scaling.attention_factor"},
      {"\"original_max_position_embeddings\": 4096", "\"x\": 4096",
       "rope_scaling.original_max_position_embeddings"},
      {"\"n_group\": 8", "\"n_group\": 7", "n_group"},
      {"\"topk_group\": 4", "\"topk_group\": 9", "topk_group"},
      {"\"num_experts_per_tok\": 8", "\"num_experts_per_tok\": 257", "num_experts_per_tok"},
      {"\"n_group\": 8", "\"n_group\": 256", "num_experts_per_tok"},
      {"\"num_experts_per_tok\": 8", "\"num_experts_per_tok\": 65", "num_experts_per_tok"},
      {"\"first_k_dense_replace\": 3", "\"first_k_dense_replace\": 62", "first_k_dense_replace"},
      {"\"moe_layer_freq\": 1", "\"moe_layer_freq\": 0", "moe_layer_freq"},
      {"\"scoring_func\": \"sigmoid\"", "\"scoring_func\": \"sqrtsoftplus\"", "scoring_func"},
      {"\"topk_method\": \"noaux_tc\"", "\"topk_method\": \"greedy\"", "topk_method"},
      {"\"topk_method\": \"noaux_tc\"", "\"topk_method\": \"best\"", "topk_method"},
      {"\"routed_scaling_factor\": 2.5", "\"routed_scaling_factor\": 0", "routed_scaling_factor"},
      {"\"quant_method\": \"fp8\"", "\"quant_method\": \"compressed-tensors\"", "quant_method"},
      {"\"fmt\": \"e4m3\"", "\"fmt\": \"e5m2\"", "quantization_config.fmt"},
      {"\"weight_block_size\": [128, 128]", "\"weight_block_size\": [64, 128]",
       "weight_block_size"},
      {"\"weight_block_size\": [128, 128]", "\"weight_block_size\": null", "weight_block_size"},
      {"\"activation_scheme\": \"dynamic\"", "\"activation_scheme\": \"static\"",
       "activation_scheme"},
      {"\"eos_token_id\": 1,", "\"eos_token_id\": 129280,", "eos_token_id"},
      {"\"eos_token_id\": 1,", "\"eos_token_id\": [1, -1],", "eos_token_id"},
      {"\"bos_token_id\": 0,", "\"bos_token_id\": [0, 1],", "bos_token_id"},
  };
  for (const Case& c : cases) {
    const std::string error = Error(Edit(kV3, c.from, c.to));
    EXPECT_TRUE(absl::StrContains(error, "config field ")) << c.to << " -> " << error;
    EXPECT_TRUE(absl::StrContains(error, c.field)) << c.to << " -> " << error;
  }
}

TEST(Config, MalformedJsonIsRefused) {
  EXPECT_TRUE(absl::StrContains(Error(""), "JSON"));
  EXPECT_TRUE(absl::StrContains(Error("[]"), "expected an object"));
  EXPECT_TRUE(absl::StrContains(Error(std::string(kV3) + "x"), "JSON"));
  EXPECT_TRUE(absl::StrContains(Error(std::string(kV3) + '\0'), "NUL"));
  EXPECT_TRUE(absl::StrContains(Error(Edit(kV3, "\"n_group\"", "\"hidden_size\": 1, \"n_group\"")),
                                "duplicate key \"hidden_size\""));
}

TEST(LoadConfig, MergesEndTokensAndNamesTheFile) {
  const std::filesystem::path dir = std::filesystem::path(TestDir()) / "moebius_load_config";
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "config.json") << kV3;
  std::ofstream(dir / "generation_config.json") << R"({"eos_token_id": [1, 128805]})";
  const absl::StatusOr<ModelConfig> config = LoadConfig(dir.string());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->eos_token_id, (std::vector<TokenId>{1, 128805}));

  std::ofstream(dir / "generation_config.json") << R"({"eos_token_id": "x"})";
  const absl::Status bad = LoadConfig(dir.string()).status();
  EXPECT_TRUE(absl::StrContains(bad.message(), "generation_config.json")) << bad;
  std::filesystem::remove_all(dir);
  EXPECT_EQ(LoadConfig(dir.string()).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace moebius::model
