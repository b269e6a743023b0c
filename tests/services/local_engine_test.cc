// Goal: one process is as careful as many. Method: damaged and impossible inputs to LocalEngine.

#include "services/common/local_engine.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "tests/kernels/reference/golden_files.h"

namespace moebius::services {
namespace {

constexpr char kTensor[] = "model.layers.0.self_attn.o_proj.weight";

class LocalEngineTest : public testing::Test {
 protected:
  LocalEngineTest() : dir_(testing::TempDir() + "/local-engine-" + std::to_string(getpid())) {
    std::filesystem::copy(kernels::reference::GoldenDir("v3-groups"), dir_);
  }
  ~LocalEngineTest() override { std::filesystem::remove_all(dir_); }
  const std::string dir_;
};

TEST_F(LocalEngineTest, AFlippedByteInTheAttentionWeightsIsFoundAndNamed) {
  ASSERT_TRUE(LocalEngine::Open(dir_, {}).ok());  // and so a manifest lies beside the model
  {
    auto checkpoint = model::Checkpoint::Open(dir_);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const model::Checkpoint::Entry entry = (*checkpoint)->Find(kTensor);
    ASSERT_NE(entry.file, nullptr);
    auto bytes = entry.file->Bytes(*entry.info);
    ASSERT_TRUE(bytes.ok());
    // The tensor's bytes are found in the file by what they are.
    std::ifstream in(entry.file->path(), std::ios::binary);
    std::string content((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const size_t at = content.find(std::string(reinterpret_cast<const char*>(bytes->data()), 64));
    ASSERT_NE(at, std::string::npos);
    content[at + 20] ^= 1;
    const std::string path = entry.file->path();
    checkpoint->reset();
    std::ofstream(path, std::ios::binary) << content;
  }
  const absl::Status status = LocalEngine::Open(dir_, {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), kTensor)) << status;
}

TEST_F(LocalEngineTest, ACacheLargerThanTheMachineIsRefusedByName) {
  LocalEngineOptions options;
  options.num_blocks = 1 << 30;
  const absl::Status status = LocalEngine::Open(dir_, options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_TRUE(absl::StartsWith(status.message(), "num_blocks:")) << status;
}

}  // namespace
}  // namespace moebius::services
