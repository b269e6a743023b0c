// Goal: a sharded checkpoint is one name space equal to the single file; an index that lies (wrong
// shard, missing or extra tensor, a path out of the directory) is refused with file and tensor.

#include "model/checkpoint.h"

#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"
#include "tests/model/test_dir.h"
#include "tests/model/tiny_checkpoint.h"

namespace moebius::model {
namespace {

class CheckpointTest : public testing::Test {
 protected:
  std::string Dir(const std::string& name) {
    return absl::StrCat(TestDir(), "/moebius_ckpt_", name);
  }
  static std::string Read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
};

TEST_F(CheckpointTest, ShardedEqualsSingle) {
  TinyOptions options;
  WriteTinyCheckpoint(Dir("single"), options);
  options.shards = 3;
  WriteTinyCheckpoint(Dir("sharded"), options);
  const auto single = Checkpoint::Open(Dir("single"));
  const auto sharded = Checkpoint::Open(Dir("sharded"));
  ASSERT_TRUE(single.ok()) << single.status();
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  EXPECT_EQ((*sharded)->files().size(), 3u);
  ASSERT_EQ((*single)->entries().size(), (*sharded)->entries().size());
  for (size_t i = 0; i < (*single)->entries().size(); ++i) {
    const std::string& name = (*single)->entries()[i].info->name;
    EXPECT_EQ(name, (*sharded)->entries()[i].info->name);
    EXPECT_EQ(*(*single)->Bytes(name), *(*sharded)->Bytes(name)) << name;
  }
  EXPECT_TRUE((*single)->HasPrefix("model.layers.3."));
  EXPECT_FALSE((*single)->HasPrefix("model.layers.4."));
  const absl::Status missing = (*single)->Bytes("nobody").status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(absl::StrContains(missing.message(), "nobody"));
}

TEST_F(CheckpointTest, ShardNamesStayInTheDirectory) {
  EXPECT_TRUE(IsSafeShardName("model-00001-of-000163.safetensors"));
  EXPECT_TRUE(IsSafeShardName("model-1-of-2.safetensors"));
  for (const char* name :
       {"../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors",
        "..", "", ".safetensors", "model.bin", "..safetensors", "a\nb.safetensors"}) {
    EXPECT_FALSE(IsSafeShardName(name)) << name;
  }
  const absl::Status status =
      ParseCheckpointIndex(R"({"weight_map":{"w":"../../x.safetensors"}})").status();
  EXPECT_TRUE(absl::StrContains(status.message(), "\"w\"")) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "../../x.safetensors")) << status;
}

TEST_F(CheckpointTest, MalformedIndexIsRefused) {
  EXPECT_FALSE(ParseCheckpointIndex("").ok());
  EXPECT_FALSE(ParseCheckpointIndex("{}").ok());
  EXPECT_FALSE(ParseCheckpointIndex(R"({"weight_map":[]})").ok());
  EXPECT_FALSE(ParseCheckpointIndex(R"({"weight_map":{"w":1}})").ok());
  EXPECT_FALSE(
      ParseCheckpointIndex(R"({"weight_map":{"w":"a.safetensors","w":"b.safetensors"}})").ok());
  const auto ok =
      ParseCheckpointIndex(R"({"metadata":{"total_size":-1},"weight_map":{"w":"a.safetensors"}})");
  ASSERT_TRUE(ok.ok()) << ok.status();
  EXPECT_EQ(ok->weight_map[0].second, "a.safetensors");
}

TEST_F(CheckpointTest, AnIndexThatLiesIsRefused) {
  const std::string dir = Dir("lies");
  TinyOptions options;
  options.shards = 2;
  const auto error_after = [&](const std::function<void(std::string&)>& edit) {
    WriteTinyCheckpoint(dir, options);
    std::string index = Read(dir + "/model.safetensors.index.json");
    edit(index);
    WriteTextFile(dir + "/model.safetensors.index.json", index);
    return std::string(Checkpoint::Open(dir).status().message());
  };
  const std::string entry = "\"lm_head.weight\": \"model-00001-of-000002.safetensors\"";
  const auto edit = [&](const std::string& to) {
    return [&, to](std::string& index) {
      ASSERT_TRUE(absl::StrContains(index, entry)) << index.substr(0, 400);
      index = absl::StrReplaceAll(index, {{entry, to}});
    };
  };
  const std::string wrong =
      error_after(edit("\"lm_head.weight\": \"model-00002-of-000002.safetensors\""));
  EXPECT_TRUE(absl::StrContains(wrong, "lm_head.weight")) << wrong;
  EXPECT_TRUE(absl::StrContains(wrong, "it is in")) << wrong;
  const std::string extra =
      error_after(edit(entry + ", \"ghost\": \"model-00001-of-000002.safetensors\""));
  EXPECT_TRUE(absl::StrContains(extra, "ghost")) << extra;
  EXPECT_TRUE(absl::StrContains(extra, "no shard holds it")) << extra;
  const std::string unmapped = error_after([&](std::string& index) {
    index = absl::StrReplaceAll(index, {{entry + ",", ""}});
  });
  EXPECT_TRUE(absl::StrContains(unmapped, "lm_head.weight")) << unmapped;
  EXPECT_TRUE(absl::StrContains(unmapped, "not in the index")) << unmapped;
  const std::string absent =
      error_after(edit("\"lm_head.weight\": \"model-00009-of-000002.safetensors\""));
  EXPECT_TRUE(absl::StrContains(absent, "model-00009")) << absent;
}

TEST_F(CheckpointTest, TheSameTensorInTwoShardsIsRefused) {
  const std::string dir = Dir("twice");
  TinyOptions options;
  options.shards = 2;
  WriteTinyCheckpoint(dir, options);
  std::filesystem::copy_file(dir + "/model-00001-of-000002.safetensors",
                             dir + "/model-00003-of-000002.safetensors");
  std::string index = Read(dir + "/model.safetensors.index.json");
  index = absl::StrReplaceAll(
      index, {{"\"weight_map\": {",
               "\"weight_map\": {\"ghost\": \"model-00003-of-000002.safetensors\","}});
  WriteTextFile(dir + "/model.safetensors.index.json", index);
  const absl::Status status = Checkpoint::Open(dir).status();
  EXPECT_TRUE(absl::StrContains(status.message(), "is also in")) << status;
}

TEST_F(CheckpointTest, ADirectoryWithoutOrWithTwoCheckpointsIsRefused) {
  const std::string dir = Dir("none");
  std::filesystem::remove_all(dir);
  EXPECT_EQ(Checkpoint::Open(dir).status().code(), absl::StatusCode::kNotFound);
  WriteTinyCheckpoint(dir, {});
  WriteTextFile(dir + "/model.safetensors.index.json", "{}");
  EXPECT_TRUE(absl::StrContains(Checkpoint::Open(dir).status().message(), "holds both"));
}

}  // namespace
}  // namespace moebius::model
