// Goal: every role gets views that hold exactly the file's numbers, in every layout of the files;
// each way in which a hosted tensor can contradict the config is refused, and tensors outside the
// role are neither needed nor read.

#include "model/weights.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/float_formats.h"
#include "gtest/gtest.h"
#include "tests/model/test_dir.h"
#include "tests/model/tiny_checkpoint.h"

namespace moebius::model {
namespace {

std::string Dir() { return TestDir() + "/moebius_weights"; }

struct Opened {
  ModelConfig config;
  std::unique_ptr<Checkpoint> checkpoint;
};

Opened Open(const TinyOptions& options, const std::map<std::string, TinyTensor>& tensors) {
  WriteTinyTensors(Dir(), options, tensors);
  absl::StatusOr<ModelConfig> config = LoadConfig(Dir());
  EXPECT_TRUE(config.ok()) << config.status();
  absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(Dir());
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return {*config, *std::move(checkpoint)};
}

void ExpectSame(const MatrixView& view, const TinyTensor& tensor) {
  EXPECT_EQ(view.rows, tensor.spec.shape[0]);
  EXPECT_EQ(view.cols, tensor.spec.shape[1]);
  ASSERT_EQ(static_cast<size_t>(view.bytes()), tensor.data.size());
  EXPECT_EQ(std::memcmp(view.data, tensor.data.data(), tensor.data.size()), 0) << tensor.spec.name;
  EXPECT_EQ(reinterpret_cast<uintptr_t>(view.data) % SizeOf(view.dtype), 0u);
}

class Weights : public testing::TestWithParam<TinyOptions> {};

TEST_P(Weights, ViewsHoldTheFilesNumbers) {
  const TinyOptions options = GetParam();
  const auto tensors = TinyTensors(options);
  const Opened opened = Open(options, tensors);
  const auto loaded = LoadAttentionWorkerWeights(*opened.checkpoint, opened.config);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const AttentionWorkerWeights& w = *loaded;
  ExpectSame(w.embed_tokens, tensors.at("model.embed_tokens.weight"));
  ExpectSame(w.lm_head, tensors.at("lm_head.weight"));
  ASSERT_EQ(w.layers.size(), 3u);
  EXPECT_EQ(w.mtp.size(), options.mtp ? 1u : 0u);
  for (const AttentionLayerWeights& layer : w.layers) {
    const std::string prefix = absl::StrCat("model.layers.", layer.layer.value(), ".");
    if (options.q_lora) {
      ExpectSame(layer.q_a_proj, tensors.at(prefix + "self_attn.q_a_proj.weight"));
      ExpectSame(layer.q_b_proj, tensors.at(prefix + "self_attn.q_b_proj.weight"));
      EXPECT_EQ(layer.q_a_layernorm.size(), 144u);
      EXPECT_TRUE(layer.q_proj.empty());
    } else {
      ExpectSame(layer.q_proj, tensors.at(prefix + "self_attn.q_proj.weight"));
      EXPECT_TRUE(layer.q_a_proj.empty());
    }
    ExpectSame(layer.kv_a_proj_with_mqa,
               tensors.at(prefix + "self_attn.kv_a_proj_with_mqa.weight"));
    ExpectSame(layer.kv_b_proj, tensors.at(prefix + "self_attn.kv_b_proj.weight"));
    ExpectSame(layer.o_proj, tensors.at(prefix + "self_attn.o_proj.weight"));
    if (options.fp8) {
      const TinyTensor& scale =
          tensors.at(prefix + "self_attn.kv_a_proj_with_mqa.weight_scale_inv");
      EXPECT_EQ(scale.spec.shape, (std::vector<int64_t>{2, 2}));  // ragged: 152 rows, 160 columns
      EXPECT_EQ(std::memcmp(layer.kv_a_proj_with_mqa.scale_inv, scale.data.data(), 16), 0);
    } else {
      EXPECT_EQ(layer.kv_a_proj_with_mqa.scale_inv, nullptr);
    }
    const TinyTensor& norm = tensors.at(prefix + "input_layernorm.weight");
    for (size_t i = 0; i < layer.input_layernorm.size(); ++i) {
      Bf16 value;
      std::memcpy(&value, norm.data.data() + 2 * i, 2);
      EXPECT_EQ(layer.input_layernorm[i], ToFloat(value));
    }
    EXPECT_EQ(layer.mlp.has_value(), layer.layer.value() == 0);
    EXPECT_EQ(layer.moe.has_value(), layer.layer.value() != 0);
    if (layer.moe) {
      EXPECT_EQ(layer.moe->gate.dtype, DType::kBf16);
      EXPECT_EQ(layer.moe->e_score_correction_bias.size(), 8u);
      ASSERT_TRUE(layer.moe->shared_experts.has_value());
      ExpectSame(layer.moe->shared_experts->down_proj,
                 tensors.at(prefix + "mlp.shared_experts.down_proj.weight"));
    }
  }
  for (const LayerId layer : MoeLayers(*opened.checkpoint, opened.config)) {
    for (uint32_t expert = 0; expert < 8; ++expert) {
      const auto shard =
          LoadExpertShard(*opened.checkpoint, opened.config, layer, ExpertId(expert));
      ASSERT_TRUE(shard.ok()) << shard.status();
      const std::string prefix =
          absl::StrCat("model.layers.", layer.value(), ".mlp.experts.", expert, ".");
      ExpectSame(shard->weights.gate_proj, tensors.at(prefix + "gate_proj.weight"));
      ExpectSame(shard->weights.up_proj, tensors.at(prefix + "up_proj.weight"));
      ExpectSame(shard->weights.down_proj, tensors.at(prefix + "down_proj.weight"));
      EXPECT_EQ(shard->bytes(), options.fp8 ? 3 * (130 * 160 + 4 * 4) : 3 * 130 * 160 * 2);
      EXPECT_EQ(shard->storage.tensor_names().size(), options.fp8 ? 6u : 3u);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Weights,
                         testing::Values(TinyOptions{}, TinyOptions{.fp8 = false},
                                         TinyOptions{.mtp = false, .q_lora = false},
                                         TinyOptions{.mtp_copies = true, .shards = 5},
                                         TinyOptions{.fp8 = false, .shards = 2}));

TEST(WeightsErrors, EveryContradictionIsNamed) {
  struct Case {
    const char* what;
    TinyOptions options;
    std::function<void(std::map<std::string, TinyTensor>&)> edit;
    const char* message;
  };
  const std::string q_a = "model.layers.1.self_attn.q_a_proj.weight";
  const std::string expert = "model.layers.2.mlp.experts.5.up_proj.weight";
  const auto set_float = [](TinyTensor& tensor, size_t index, float value) {
    std::memcpy(tensor.data.data() + 4 * index, &value, 4);
  };
  const Case cases[] = {
      {"missing",
       {},
       [&](auto& t) { t.erase("model.norm.weight"); },
       "tensor \"model.norm.weight\" is missing"},
      {"shape",
       {},
       [&](auto& t) {
         t.at(q_a).spec.shape = {160, 144};
       },
       "is F8_E4M3 [160, 144], the config implies F8_E4M3 [144, 160]"},
      {"no scale",
       {},
       [&](auto& t) { t.erase(q_a + "_scale_inv"); },
       "q_a_proj.weight_scale_inv\" is missing"},
      {"scale shape",
       {},
       [&](auto& t) {
         t.at(q_a + "_scale_inv").spec.shape = {4, 1};
       },
       "the config implies F32 [2, 2]"},
      {"scale zero",
       {},
       [&](auto& t) { set_float(t.at(q_a + "_scale_inv"), 3, 0.0f); },
       "scale [1, 1] is 0"},
      {"scale negative",
       {},
       [&](auto& t) { set_float(t.at(q_a + "_scale_inv"), 0, -1.0f); },
       "scale [0, 0] is -1"},
      {"scale nan",
       {},
       [&](auto& t) {
         set_float(t.at(q_a + "_scale_inv"), 1, std::numeric_limits<float>::quiet_NaN());
       },
       "scale [0, 1] is nan"},
      {"scale inf",
       {},
       [&](auto& t) {
         set_float(t.at(expert + "_scale_inv"), 1, std::numeric_limits<float>::infinity());
       },
       "scale [0, 1] is inf"},
      {"bias nan",
       {},
       [&](auto& t) {
         set_float(t.at("model.layers.1.mlp.gate.e_score_correction_bias"), 2,
                   std::numeric_limits<float>::quiet_NaN());
       },
       "not finite"},
      {"norm type",
       {},
       [&](auto& t) { t.at("model.norm.weight").spec.dtype = TensorDType::kF16; },
       "dtype F16"},
      {"wrong fp8 variant",
       {},
       [&](auto& t) { t.at(q_a).spec.dtype = TensorDType::kF8E4m3Fnuz; },
       "dtype F8_E4M3FNUZ"},
      {"expert in bf16 in an fp8 model",
       {},
       [&](auto& t) {
         t.at(expert).spec.dtype = TensorDType::kBf16;
         t.at(expert).data.resize(130 * 160 * 2);
       },
       "dtype BF16, expected F8_E4M3"},
      {"scale of a bf16 matrix",
       {},
       [&](auto& t) {
         t.at(q_a).spec.dtype = TensorDType::kBf16;
         t.at(q_a).data.resize(144 * 160 * 2);
       },
       "q_a_proj.weight_scale_inv\": present, but"},
      {"fp8 matrix in a bf16 model",
       {.fp8 = false},
       [&](auto& t) {
         t.at(q_a).spec.dtype = TensorDType::kF8E4m3;
         t.at(q_a).data.resize(144 * 160);
       },
       "no quantization_config"},
      {"half an mtp layer",
       {},
       [&](auto& t) { t.erase("model.layers.3.enorm.weight"); },
       "tensor \"model.layers.3.enorm.weight\" is missing"},
  };
  for (const Case& c : cases) {
    auto tensors = TinyTensors(c.options);
    c.edit(tensors);
    const Opened opened = Open(c.options, tensors);
    const absl::Status status =
        absl::StrContains(c.message, "inf") || absl::StrContains(c.what, "expert")
            ? LoadExpertShard(*opened.checkpoint, opened.config, LayerId(2), ExpertId(5)).status()
            : LoadAttentionWorkerWeights(*opened.checkpoint, opened.config).status();
    EXPECT_FALSE(status.ok()) << c.what;
    EXPECT_TRUE(absl::StrContains(status.message(), c.message)) << c.what << " -> " << status;
    EXPECT_TRUE(absl::StrContains(status.message(), Dir())) << c.what << " -> " << status;
  }
}

TEST(WeightsErrors, ExpertsOutsideTheModelAreRefused) {
  const Opened opened = Open({}, TinyTensors({}));
  for (const auto& [layer, expert] :
       std::vector<std::pair<uint32_t, uint32_t>>{{0, 0}, {4, 0}, {1, 8}, {0xFFFFFFFF, 0}}) {
    EXPECT_EQ(LoadExpertShard(*opened.checkpoint, opened.config, LayerId(layer), ExpertId(expert))
                  .status()
                  .code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST(WeightsRoles, RolesNeedOnlyWhatTheyHost) {
  auto tensors = TinyTensors({});
  std::map<std::string, TinyTensor> without_experts, experts_only;
  for (const auto& [name, tensor] : tensors) {
    (absl::StrContains(name, ".mlp.experts.") ? experts_only : without_experts)[name] = tensor;
  }
  {
    const Opened opened = Open({}, without_experts);
    const auto w = LoadAttentionWorkerWeights(*opened.checkpoint, opened.config);
    ASSERT_TRUE(w.ok()) << w.status();
    EXPECT_EQ(w->storage.tensor_names().size(), without_experts.size());
  }
  {
    const Opened opened = Open({}, experts_only);
    EXPECT_TRUE(LoadExpertShard(*opened.checkpoint, opened.config, LayerId(3), ExpertId(7)).ok());
    WeightStorage storage;
    EXPECT_FALSE(LoadGate(*opened.checkpoint, opened.config, LayerId(1), storage).ok());
  }
  const Opened opened = Open({}, tensors);
  WeightStorage storage;
  const auto gate = LoadGate(*opened.checkpoint, opened.config, LayerId(1), storage);
  ASSERT_TRUE(gate.ok()) << gate.status();
  EXPECT_FALSE(gate->shared_experts.has_value());
  EXPECT_EQ(storage.tensor_names().size(), 2u);
}

TEST(WeightsRoles, AnF32GateIsNarrowedOnlyIfNothingIsLost) {
  const std::string name = "model.layers.1.mlp.gate.weight";
  auto tensors = TinyTensors({});
  TinyTensor& gate = tensors.at(name);
  const std::vector<std::byte> bf16 = gate.data;
  std::vector<float> values(bf16.size() / 2);
  for (size_t i = 0; i < values.size(); ++i) {
    Bf16 value;
    std::memcpy(&value, bf16.data() + 2 * i, 2);
    values[i] = ToFloat(value);
  }
  const auto store = [&] {
    gate.spec.dtype = TensorDType::kF32;
    gate.data.resize(values.size() * 4);
    std::memcpy(gate.data.data(), values.data(), gate.data.size());
  };
  store();
  {
    const Opened opened = Open({}, tensors);
    const auto w = LoadAttentionWorkerWeights(*opened.checkpoint, opened.config);
    ASSERT_TRUE(w.ok()) << w.status();
    const MatrixView& view = w->layers[1].moe->gate;
    EXPECT_EQ(view.dtype, DType::kBf16);
    EXPECT_EQ(std::memcmp(view.data, bf16.data(), bf16.size()), 0);
  }
  values[7] += values[7] / 1024;
  store();
  const Opened opened = Open({}, tensors);
  const absl::Status status =
      LoadAttentionWorkerWeights(*opened.checkpoint, opened.config).status();
  EXPECT_TRUE(absl::StrContains(status.message(), name)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "element 7")) << status;
}

TEST(WeightsRoles, AModelWhoseMtpLayerWasLeftOutStillLoads) {
  const Opened opened = Open({.mtp = true}, TinyTensors({.mtp = false}));
  const auto w = LoadAttentionWorkerWeights(*opened.checkpoint, opened.config);
  ASSERT_TRUE(w.ok()) << w.status();
  EXPECT_TRUE(w->mtp.empty());
  EXPECT_EQ(MoeLayers(*opened.checkpoint, opened.config),
            (std::vector<LayerId>{LayerId(1), LayerId(2)}));
}

TEST(WeightsRoles, MisalignedDataAreCopiedNotMisread) {
  // One odd-sized tensor of a wide element type shifts every BF16 tensor behind it by one byte.
  TinyOptions options{.fp8 = false};
  auto tensors = TinyTensors(options);
  WriteTinyTensors(Dir(), options, tensors);
  std::string header = "{", data(1, 'x');
  header += R"("pad":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  for (const auto& [name, tensor] : tensors) {
    absl::StrAppend(&header, ",\"", name, "\":{\"dtype\":\"", Name(tensor.spec.dtype),
                    "\",\"shape\":[");
    for (size_t i = 0; i < tensor.spec.shape.size(); ++i) {
      absl::StrAppend(&header, i ? "," : "", tensor.spec.shape[i]);
    }
    absl::StrAppend(&header, "],\"data_offsets\":[", data.size(), ",",
                    data.size() + tensor.data.size(), "]}");
    data.append(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
  }
  header += "}";
  header.append((8 - header.size() % 8) % 8, ' ');
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(uint64_t{header.size()} >> (8 * i));
  WriteTextFile(Dir() + "/model.safetensors", length + header + data);
  const auto checkpoint = Checkpoint::Open(Dir());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto w = LoadAttentionWorkerWeights(**checkpoint, *LoadConfig(Dir()));
  ASSERT_TRUE(w.ok()) << w.status();
  ExpectSame(w->lm_head, tensors.at("lm_head.weight"));
  ExpectSame(w->layers[1].o_proj, tensors.at("model.layers.1.self_attn.o_proj.weight"));
}

}  // namespace
}  // namespace moebius::model
