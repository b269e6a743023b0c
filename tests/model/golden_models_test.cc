// Goal: every model directory of tests/golden, written by an independent library, loads completely:
// config, headers, all roles' weights, digest; and every tensor of a directory belongs to a role.

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/inspect.h"
#include "model/manifest.h"
#include "model/weights.h"

namespace moebius::model {
namespace {

std::vector<std::string> GoldenModels() {
  std::vector<std::string> dirs;
  for (const auto& entry :
       std::filesystem::directory_iterator(MOEBIUS_SOURCE_DIR "/tests/golden")) {
    if (std::filesystem::exists(entry.path() / "config.json")) {
      dirs.push_back(entry.path().string());
    }
  }
  std::sort(dirs.begin(), dirs.end());
  return dirs;
}

TEST(GoldenModels, LoadCompletely) {
  const std::vector<std::string> dirs = GoldenModels();
  EXPECT_GE(dirs.size(), 6u);
  bool any_fp8 = false, any_mtp = false, any_index = false, any_plain_q = false;
  for (const std::string& dir : dirs) {
    SCOPED_TRACE(dir);
    const auto config = LoadConfig(dir);
    ASSERT_TRUE(config.ok()) << config.status();
    const auto checkpoint = Checkpoint::Open(dir);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto attention = LoadAttentionWorkerWeights(**checkpoint, *config);
    ASSERT_TRUE(attention.ok()) << attention.status();
    std::set<std::string> hosted(attention->storage.tensor_names().begin(),
                                 attention->storage.tensor_names().end());
    for (const LayerId layer : MoeLayers(**checkpoint, *config)) {
      for (uint32_t expert = 0; expert < config->n_routed_experts; ++expert) {
        const auto shard = LoadExpertShard(**checkpoint, *config, layer, ExpertId(expert));
        ASSERT_TRUE(shard.ok()) << shard.status();
        hosted.insert(shard->storage.tensor_names().begin(), shard->storage.tensor_names().end());
      }
    }
    const ModelReport report = InspectModel(**checkpoint, *config);
    if (report.ignored_bytes == 0) {
      EXPECT_EQ(hosted.size(), (*checkpoint)->entries().size());
    }
    const auto manifest = ComputeManifest(**checkpoint, *config);
    ASSERT_TRUE(manifest.ok()) << manifest.status();
    EXPECT_TRUE(VerifyTensors(*manifest, **checkpoint, attention->storage.tensor_names()).ok());
    any_fp8 |= config->wire_dtype() == WireDtype::kE4m3;
    any_mtp |= !attention->mtp.empty();
    any_index |= (*checkpoint)->files().size() > 1;
    any_plain_q |= !config->q_lora_rank.has_value();
  }
  EXPECT_TRUE(any_fp8);
  EXPECT_TRUE(any_mtp);
  EXPECT_TRUE(any_index);
  EXPECT_TRUE(any_plain_q);
}

}  // namespace
}  // namespace moebius::model
