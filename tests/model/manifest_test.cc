// Goal: the digest changes with anything that changes the numbers (config, name, dtype, shape, any
// byte) and with nothing else (sharding, order, location); a damaged tensor is found by the worker
// that hosts it, and only by it.

#include "model/manifest.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"
#include "model/weights.h"
#include "tests/model/test_dir.h"
#include "tests/model/tiny_checkpoint.h"

namespace moebius::model {
namespace {

std::string Dir(const std::string& name) { return TestDir() + "/moebius_manifest_" + name; }

Manifest Compute(const std::string& dir) {
  const auto checkpoint = Checkpoint::Open(dir);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto config = LoadConfig(dir);
  EXPECT_TRUE(config.ok()) << config.status();
  const auto manifest = ComputeManifest(**checkpoint, *config);
  EXPECT_TRUE(manifest.ok()) << manifest.status();
  return *manifest;
}

absl::StatusOr<Manifest> Load(const std::string& dir, const std::string& cache_dir = "") {
  const auto checkpoint = Checkpoint::Open(dir);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return LoadOrComputeManifest(**checkpoint, *LoadConfig(dir), cache_dir);
}

void FlipByteOf(const std::string& dir, const std::string& tensor, uint64_t at) {
  const auto checkpoint = Checkpoint::Open(dir);
  ASSERT_TRUE(checkpoint.ok());
  const Checkpoint::Entry entry = (*checkpoint)->Find(tensor);
  ASSERT_NE(entry.file, nullptr);
  std::fstream file(entry.file->path(), std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(entry.info->offset + at));
  const char byte = static_cast<char>(file.get() ^ 0x10);
  file.seekp(static_cast<std::streamoff>(entry.info->offset + at));
  file.put(byte);
}

TEST(Manifest, DigestIsTheModelsAndNotTheFiles) {
  WriteTinyCheckpoint(Dir("a"), {});
  WriteTinyCheckpoint(Dir("b"), {.shards = 4});
  const Manifest single = Compute(Dir("a"));
  EXPECT_EQ(single.digest, Compute(Dir("b")).digest);
  EXPECT_EQ(single.digest64(), single.digest.low);
  EXPECT_NE(single.digest64(), 0u);

  WriteTinyCheckpoint(Dir("b"), {.seed = 2});
  EXPECT_NE(single.digest, Compute(Dir("b")).digest) << "other numbers";
  auto renamed = TinyTensors({});
  renamed["x"] = renamed.at("lm_head.weight");
  renamed["x"].spec.name = "x";
  renamed.erase("lm_head.weight");
  WriteTinyTensors(Dir("b"), {}, renamed);
  EXPECT_NE(single.digest, Compute(Dir("b")).digest) << "other name";
  auto reshaped = TinyTensors({});
  reshaped.at("lm_head.weight").spec.shape = {160, 96};
  WriteTinyTensors(Dir("b"), {}, reshaped);
  EXPECT_NE(single.digest, Compute(Dir("b")).digest) << "other shape";
  auto retyped = TinyTensors({});
  retyped.at("lm_head.weight").spec.dtype = TensorDType::kF16;
  WriteTinyTensors(Dir("b"), {}, retyped);
  EXPECT_NE(single.digest, Compute(Dir("b")).digest) << "other dtype";
}

TEST(Manifest, ConfigFieldsThatReachTheArithmeticReachTheDigest) {
  const std::string json = TinyConfigJson({});
  const Hash128Value original = HashOfConfig(*ParseConfig(json));
  const std::pair<const char*, const char*> edits[] = {
      {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-05"},
      {"\"routed_scaling_factor\": 2.5", "\"routed_scaling_factor\": 2.5000001"},
      {"\"topk_group\": 2", "\"topk_group\": 3"},
      {"\"rope_theta\": 10000", "\"rope_theta\": 10001"},
      {"\"mscale_all_dim\": 1.0", "\"mscale_all_dim\": 0.9"},
      {"\"norm_topk_prob\": true", "\"norm_topk_prob\": false"},
      {"\"fmt\": \"e4m3\"", "\"fmt\": \"e4m3\", \"scale_fmt\": \"ue8m0\""},
      {"\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": 2"},
      {"\"max_position_embeddings\": 256", "\"max_position_embeddings\": 512"},
  };
  for (const auto& [from, to] : edits) {
    const std::string edited = absl::StrReplaceAll(json, {{from, to}});
    ASSERT_NE(edited, json) << from;
    const auto config = ParseConfig(edited);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_NE(HashOfConfig(*config), original) << to;
  }
  const auto other_end =
      ParseConfig(absl::StrReplaceAll(json, {{"\"eos_token_id\": 1", "\"eos_token_id\": [1, 2]"}}));
  EXPECT_EQ(HashOfConfig(*other_end), original);
}

TEST(Manifest, TextFormReadsBackAndEveryEditIsRefused) {
  WriteTinyCheckpoint(Dir("text"), {});
  const Manifest manifest = Compute(Dir("text"));
  const std::string json = WriteManifest(manifest);
  const auto parsed = ParseManifest(json);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->digest, manifest.digest);
  EXPECT_EQ(parsed->tensors, manifest.tensors);

  const std::string digest = ToHex(manifest.digest);
  const std::string hash = ToHex(manifest.tensors.at("lm_head.weight").xxh3_128);
  const std::pair<std::string, std::string> edits[] = {
      {"moebius-manifest-1", "moebius-manifest-2"},
      {digest, std::string(32, '0')},
      {digest, digest.substr(1)},
      {hash, "g" + hash.substr(1)},
      {hash, (hash[0] == '0' ? "1" : "0") + hash.substr(1)},
      {"\"lm_head.weight\"", "\"lm_head.weighs\""},
      {"\"tensors\"", "\"tensor\""},
      {"F8_E4M3", "F9"},
  };
  for (const auto& [from, to] : edits) {
    const std::string edited = absl::StrReplaceAll(json, {{from, to}});
    ASSERT_NE(edited, json) << from;
    const absl::Status status = ParseManifest(edited).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << to;
    EXPECT_TRUE(absl::StrContains(status.message(), "manifest field")) << status;
  }
  EXPECT_FALSE(ParseManifest("").ok());
  EXPECT_FALSE(ParseManifest("[]").ok());
  Hash128Value value;
  EXPECT_FALSE(FromHex("+0000000000000000000000000000000", &value));
  EXPECT_FALSE(FromHex(" 0000000000000000000000000000000", &value));
}

TEST(Manifest, AChangedByteIsFoundByTheWorkerThatHostsIt) {
  const std::string dir = Dir("damage");
  const std::string damaged = "model.layers.2.mlp.experts.5.down_proj.weight";
  WriteTinyCheckpoint(dir, {.shards = 2});
  ASSERT_TRUE(Load(dir).ok());  // stores moebius.manifest.json
  ASSERT_TRUE(std::filesystem::exists(dir + "/moebius.manifest.json"));
  FlipByteOf(dir, damaged, 777);

  const auto checkpoint = Checkpoint::Open(dir);
  ASSERT_TRUE(checkpoint.ok());
  const ModelConfig config = *LoadConfig(dir);
  const auto manifest = LoadOrComputeManifest(**checkpoint, config, "");
  ASSERT_TRUE(manifest.ok()) << manifest.status();
  const auto verify = [&](uint32_t layer, uint32_t expert) {
    const auto shard = LoadExpertShard(**checkpoint, config, LayerId(layer), ExpertId(expert));
    EXPECT_TRUE(shard.ok()) << shard.status();
    return VerifyTensors(*manifest, **checkpoint, shard->storage.tensor_names());
  };
  EXPECT_TRUE(verify(2, 4).ok());
  EXPECT_TRUE(verify(1, 5).ok());
  const absl::Status status = verify(2, 5);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(absl::StrContains(status.message(), damaged)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), ".safetensors")) << status;
  const auto attention = LoadAttentionWorkerWeights(**checkpoint, config);
  ASSERT_TRUE(attention.ok());
  EXPECT_TRUE(VerifyTensors(*manifest, **checkpoint, attention->storage.tensor_names()).ok());
  EXPECT_NE(Compute(dir).digest, manifest->digest);
}

TEST(Manifest, AManifestOfAnotherModelIsRefused) {
  const std::string dir = Dir("other");
  WriteTinyCheckpoint(dir, {});
  ASSERT_TRUE(Load(dir).ok());
  const std::string config = TinyConfigJson({});
  WriteTextFile(
      dir + "/config.json",
      absl::StrReplaceAll(config, {{"\"topk_group\": 2", "\"topk_group\": 1"},
                                   {"\"num_experts_per_tok\": 3", "\"num_experts_per_tok\": 2"}}));
  const absl::Status status = Load(dir).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "moebius.manifest.json")) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "config.json")) << status;
  WriteTextFile(dir + "/moebius.manifest.json", "garbage");
  EXPECT_FALSE(Load(dir).ok());
}

TEST(Manifest, IsStoredInTheCacheWhenTheModelsDirectoryCannotBeWritten) {
  const std::string dir = Dir("readonly"), cache = Dir("cache_home") + "/moebius";
  std::filesystem::remove_all(Dir("cache_home"));
  WriteTinyCheckpoint(dir, {});
  // Permissions do not bind root, so the file is stopped by a directory in the temporary's place.
  std::filesystem::create_directories(absl::StrCat(dir, "/moebius.manifest.json.tmp.", ::getpid()));
  EXPECT_TRUE(Load(dir).ok()) << "no cache: computed and not stored";
  const auto first = Load(dir, cache);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_FALSE(std::filesystem::exists(dir + "/moebius.manifest.json"));
  ASSERT_FALSE(std::filesystem::is_empty(cache));
  // The second load reads the cache: after damage it still tells of the undamaged model.
  FlipByteOf(dir, "lm_head.weight", 3);
  const auto second = Load(dir, cache);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(first->digest, second->digest);
  const auto checkpoint = Checkpoint::Open(dir);
  const std::vector<std::string> names = {"lm_head.weight"};
  EXPECT_EQ(VerifyTensors(*second, **checkpoint, names).code(), absl::StatusCode::kDataLoss);
  // Another model in the same place makes the entry stale.
  auto tensors = TinyTensors({.q_lora = false});
  WriteTinyTensors(dir, {.q_lora = false}, tensors);
  const auto third = Load(dir, cache);
  ASSERT_TRUE(third.ok()) << third.status();
  EXPECT_NE(third->digest, first->digest);
}

}  // namespace
}  // namespace moebius::model
