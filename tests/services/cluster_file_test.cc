// Goal: cluster.json is read as it was written, or refused with the place named.

#include "services/cli/cluster_file.h"

#include "gtest/gtest.h"

namespace moebius::services {
namespace {

TEST(ClusterFile, ReadsWhatItWrote) {
  const SavedCluster cluster{
      "127.0.0.1:8700", "127.0.0.1:1", 2, {{"controller", 12}, {"expert-1", 0}}};
  const auto again = ParseClusterFile(WriteClusterFile(cluster));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(*again, cluster);
}

TEST(ClusterFile, RefusesEverythingElse) {
  for (const char* text :
       {"", "[]", "{}", R"({"gateway":"g","controller":"c"})",
        R"({"gateway":1,"controller":"c","processes":[]})",
        R"({"gateway":"g","controller":"c","processes":{}})",
        R"({"gateway":"g","controller":"c","replicas":0,"processes":[]})",
        R"({"gateway":"g","controller":"c","replicas":65,"processes":[]})",
        R"({"gateway":"g","controller":"c","replicas":"2","processes":[]})",
        R"({"gateway":"g","controller":"c","processes":["x"]})",
        R"({"gateway":"g","controller":"c","processes":[{"name":"x"}]})",
        R"({"gateway":"g","controller":"c","processes":[{"name":"x","pid":-1}]})",
        R"({"gateway":"g","controller":"c","processes":[{"name":"x","pid":4294967297}]})"}) {
    EXPECT_EQ(ParseClusterFile(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  const auto second = ParseClusterFile(
      R"({"gateway":"g","controller":"c","processes":[{"name":"x","pid":1},{"name":"y"}]})");
  EXPECT_NE(second.status().message().find("processes[1]"), absl::string_view::npos);
}

}  // namespace
}  // namespace moebius::services
