// Goal: a converted model loads as the other format with the numbers that the formula gives, from
// and to any sharding, with its other files; nothing is overwritten and a failure leaves nothing.

#include "model/convert.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/float_formats.h"
#include "base/prng.h"
#include "gtest/gtest.h"
#include "model/manifest.h"
#include "model/weights.h"
#include "tests/model/test_dir.h"
#include "tests/model/tiny_checkpoint.h"

namespace moebius::model {
namespace {

namespace fs = std::filesystem;

std::string Dir(const std::string& name) {
  const std::string dir = TestDir() + "/moebius_convert_" + name;
  fs::remove_all(dir);
  return dir;
}

struct Loaded {
  ModelConfig config;
  std::unique_ptr<Checkpoint> checkpoint;
  AttentionWorkerWeights attention;
  ExpertShard expert;
};

Loaded LoadAll(const std::string& dir) {
  Loaded loaded;
  const auto config = LoadConfig(dir);
  EXPECT_TRUE(config.ok()) << config.status();
  loaded.config = *config;
  auto checkpoint = Checkpoint::Open(dir);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  loaded.checkpoint = *std::move(checkpoint);
  auto attention = LoadAttentionWorkerWeights(*loaded.checkpoint, loaded.config);
  EXPECT_TRUE(attention.ok()) << attention.status();
  loaded.attention = *std::move(attention);
  auto expert = LoadExpertShard(*loaded.checkpoint, loaded.config, LayerId(3), ExpertId(7));
  EXPECT_TRUE(expert.ok()) << expert.status();
  loaded.expert = *std::move(expert);
  return loaded;
}

float Element(const MatrixView& m, int64_t row, int64_t col) {
  const int64_t index = row * m.cols + col;
  if (m.dtype == DType::kBf16) return ToFloat(reinterpret_cast<const Bf16*>(m.data)[index]);
  return ToFloat(reinterpret_cast<const E4m3*>(m.data)[index]) *
         m.scale_inv[row / 128 * CeilDiv(m.cols, 128) + col / 128];
}

TEST(Convert, Fp8ToBf16RoundsEveryWeightOnce) {
  const std::string in = Dir("fp8"), out = Dir("to_bf16");
  WriteTinyCheckpoint(in, {.mtp_copies = true, .shards = 3});
  WriteTextFile(in + "/tokenizer.json", "{\"any\": \"bytes\"}");
  WriteTextFile(in + "/generation_config.json", "{\"eos_token_id\": [1, 5]}");
  uint64_t last_done = 0, last_total = 0;
  const absl::Status status = ConvertModel(
      in, out, {.target = ConvertTarget::kBf16, .progress = [&](uint64_t a, uint64_t b) {
                  EXPECT_GE(a, last_done);
                  last_done = a;
                  last_total = b;
                }});
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(last_done, last_total);
  EXPECT_GT(last_total, 100'000u);
  EXPECT_TRUE(fs::exists(out + "/model.safetensors"));
  EXPECT_TRUE(fs::exists(out + "/tokenizer.json"));
  const Loaded before = LoadAll(in), after = LoadAll(out);
  EXPECT_EQ(after.config.wire_dtype(), WireDtype::kBf16);
  EXPECT_EQ(after.config.eos_token_id, (std::vector<TokenId>{1, 5}));
  for (const Checkpoint::Entry& entry : after.checkpoint->entries()) {
    EXPECT_FALSE(absl::EndsWith(entry.info->name, "_scale_inv")) << entry.info->name;
  }
  const auto compare = [](const MatrixView& a, const MatrixView& b) {
    EXPECT_EQ(b.dtype, DType::kBf16);
    for (int64_t row = 0; row < a.rows; ++row) {
      for (int64_t col = 0; col < a.cols; ++col) {
        ASSERT_EQ(ToFloat(ToBf16(Element(a, row, col))), Element(b, row, col));
      }
    }
  };
  compare(before.attention.layers[1].kv_a_proj_with_mqa,
          after.attention.layers[1].kv_a_proj_with_mqa);
  compare(before.attention.layers[0].mlp->down_proj, after.attention.layers[0].mlp->down_proj);
  compare(before.expert.weights.up_proj, after.expert.weights.up_proj);
  EXPECT_EQ(after.attention.mtp.size(), 1u);
  EXPECT_EQ(std::memcmp(before.attention.mtp[0].eh_proj.data, after.attention.mtp[0].eh_proj.data,
                        static_cast<size_t>(before.attention.mtp[0].eh_proj.bytes())),
            0);
}

TEST(Convert, Bf16ToFp8QuantisesWhatThePublishedCheckpointsDo) {
  const std::string in = Dir("bf16"), out = Dir("to_fp8");
  WriteTinyCheckpoint(in, {.fp8 = false});
  const absl::Status status =
      ConvertModel(in, out, {.target = ConvertTarget::kFp8, .max_shard_bytes = 400'000});
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(fs::exists(out + "/model.safetensors.index.json"));
  const Loaded before = LoadAll(in), after = LoadAll(out);
  EXPECT_GT(after.checkpoint->files().size(), 2u);
  EXPECT_EQ(after.config.wire_dtype(), WireDtype::kE4m3);
  // The same names and types as a checkpoint that was FP8 from the start.
  const auto reference = TinyTensors({.fp8 = true});
  ASSERT_EQ(after.checkpoint->entries().size(), reference.size());
  for (const auto& [name, tensor] : reference) {
    const Checkpoint::Entry entry = after.checkpoint->Find(name);
    ASSERT_NE(entry.info, nullptr) << name;
    EXPECT_EQ(entry.info->dtype, tensor.spec.dtype) << name;
    EXPECT_EQ(entry.info->shape, tensor.spec.shape) << name;
  }
  const MatrixView& a = before.attention.layers[2].q_b_proj;
  const MatrixView& b = after.attention.layers[2].q_b_proj;
  double error = 0, norm = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t col = 0; col < a.cols; ++col) {
      error += std::pow(Element(a, row, col) - Element(b, row, col), 2);
      norm += std::pow(Element(a, row, col), 2);
    }
  }
  EXPECT_LT(std::sqrt(error / norm), 0.04);
  EXPECT_GT(error, 0);

  // There and back: BF16 of what FP8 holds, and quantising that again changes nothing.
  const std::string back = Dir("back"), again = Dir("again");
  ASSERT_TRUE(ConvertModel(out, back, {.target = ConvertTarget::kBf16}).ok());
  ASSERT_TRUE(ConvertModel(back, again, {.target = ConvertTarget::kFp8}).ok());
  const auto first = Checkpoint::Open(out), second = Checkpoint::Open(again);
  int64_t same = 0, codes = 0;
  for (const Checkpoint::Entry& entry : (*first)->entries()) {
    if (entry.info->dtype != TensorDType::kF8E4m3) continue;
    const auto x = *(*first)->Bytes(entry.info->name), y = *(*second)->Bytes(entry.info->name);
    for (size_t i = 0; i < x.size(); ++i) same += x[i] == y[i];
    codes += static_cast<int64_t>(x.size());
  }
  EXPECT_EQ(same, codes);
}

TEST(Convert, F32ToBf16RoundsEveryMatrixOnce) {
  const std::string in = Dir("f32"), out = Dir("f32_to_bf16");
  auto tensors = TinyTensors({.fp8 = false});
  std::map<std::string, std::vector<float>> originals;
  Prng prng(5);
  for (auto& [name, tensor] : tensors) {
    if (tensor.spec.shape.size() != 2) continue;
    std::vector<float> values(tensor.data.size() / sizeof(Bf16));
    for (float& value : values) value = (prng.Unit() - 0.5f) * 0.1f;
    tensor.spec.dtype = TensorDType::kF32;
    tensor.data.resize(values.size() * sizeof(float));
    std::memcpy(tensor.data.data(), values.data(), tensor.data.size());
    originals[name] = std::move(values);
  }
  WriteTinyTensors(in, {.fp8 = false}, tensors);
  const auto config = LoadConfig(in);
  const auto unserved = Checkpoint::Open(in);
  ASSERT_TRUE(config.ok() && unserved.ok());
  const absl::Status refused = LoadAttentionWorkerWeights(**unserved, *config).status();
  EXPECT_TRUE(absl::StrContains(refused.message(), "convert --to bf16")) << refused;

  const absl::Status status = ConvertModel(in, out, {.target = ConvertTarget::kBf16});
  ASSERT_TRUE(status.ok()) << status;
  const Loaded after = LoadAll(out);
  int64_t compared = 0;
  for (const auto& [name, values] : originals) {
    const auto bytes = after.checkpoint->Bytes(name);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    ASSERT_EQ(bytes->size(), values.size() * sizeof(Bf16)) << name;
    const auto* rounded = reinterpret_cast<const Bf16*>(bytes->data());
    for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(rounded[i], ToBf16(values[i])) << name;
    compared += static_cast<int64_t>(values.size());
  }
  EXPECT_GT(compared, 100'000);
  EXPECT_EQ(ConvertModel(out, Dir("f32_twice"), {.target = ConvertTarget::kBf16}).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(Convert, RefusesToOverwriteAndLeavesNothingBehind) {
  const std::string in = Dir("in"), out = Dir("out");
  WriteTinyCheckpoint(in, {});
  EXPECT_EQ(ConvertModel(in, out, {.target = ConvertTarget::kFp8}).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ConvertModel(in, in, {.target = ConvertTarget::kBf16}).code(),
            absl::StatusCode::kAlreadyExists);
  fs::create_directories(out);
  WriteTextFile(out + "/precious", "x");
  EXPECT_EQ(ConvertModel(in, out, {.target = ConvertTarget::kBf16}).code(),
            absl::StatusCode::kAlreadyExists);
  fs::remove(out + "/precious");
  EXPECT_TRUE(ConvertModel(in, out + "/", {.target = ConvertTarget::kBf16}).ok())
      << "an empty directory may be filled";

  const std::string failed = Dir("failed");
  auto tensors = TinyTensors({});
  tensors.erase("model.layers.2.mlp.experts.3.up_proj.weight_scale_inv");
  WriteTinyTensors(in, {}, tensors);
  const absl::Status status = ConvertModel(in, failed, {.target = ConvertTarget::kBf16});
  EXPECT_TRUE(absl::StrContains(status.message(), "experts.3.up_proj")) << status;
  for (const auto& entry : fs::directory_iterator(TestDir())) {
    EXPECT_FALSE(absl::StrContains(entry.path().string(), "moebius_convert_failed"))
        << entry.path();
  }
}

TEST(Convert, QuantisedNames) {
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.weight", "model.layers.61.self_attn.kv_b_proj.weight",
        "model.layers.9.mlp.experts.255.down_proj.weight",
        "model.layers.9.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight"}) {
    EXPECT_TRUE(IsQuantizedName(name)) << name;
  }
  for (const char* name :
       {"model.embed_tokens.weight", "lm_head.weight", "model.layers.9.mlp.gate.weight",
        "model.layers.61.eh_proj.weight", "model.layers.61.shared_head.head.weight",
        "model.layers.9.self_attn.q_a_layernorm.weight", "weight", "",
        "model.layers.9.mlp.gate.e_score_correction_bias"}) {
    EXPECT_FALSE(IsQuantizedName(name)) << name;
  }
}

}  // namespace
}  // namespace moebius::model
