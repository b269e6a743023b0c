// Goal: nobody mistakes kernels that no GPU has run for tested ones. Method: the committed record
// of the last run on a GPU machine (bench/results, written by the bundle's run.sh) must carry the
// hash of kernels/cuda as it is now; then every CUDA test of this build must have passed in it, and
// all that launch such kernels must have been clean under three tools of compute-sanitizer.

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace moebius::kernels::cuda {
namespace {

TEST(DeviceRun, EveryCudaTestPassedWithTheseKernels) {
  std::ifstream file(MOEBIUS_DEVICE_RUN);
  if (!file) GTEST_SKIP() << "NOT TESTED ON GPU: no run is recorded in " MOEBIUS_DEVICE_RUN;
  const nlohmann::json run = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(run.is_object()) << MOEBIUS_DEVICE_RUN " cannot be read";
  const std::string hash = run.value("kernels_cuda_hash", "");
  if (hash != MOEBIUS_CUDA_HASH) {
    GTEST_SKIP() << "NOT TESTED ON GPU: kernels/cuda is at " MOEBIUS_CUDA_HASH
                    ", the last run on a GPU was of "
                 << hash << " (" << run.value("date", "?") << ", " << run.value("device", "?")
                 << ")";
  }
  EXPECT_TRUE(run["tests_failed"].empty()) << run["tests_failed"];
  std::set<std::string> passed, sanitized;
  for (const nlohmann::json& name : run["tests_passed"]) passed.insert(name.get<std::string>());
  for (const nlohmann::json& name : run.value("sanitized", nlohmann::json::array()))
    sanitized.insert(name.get<std::string>());
  for (const absl::string_view name : absl::StrSplit(MOEBIUS_CUDA_TESTS, ',', absl::SkipEmpty())) {
    EXPECT_TRUE(passed.contains(std::string(name))) << name << " is not in the last run on a GPU";
    if (name == "launch_comparison_test") continue;  // tests a test's means
    for (const char* tool : {"initcheck", "memcheck", "synccheck"}) {
      EXPECT_TRUE(sanitized.contains(absl::StrCat(tool, ":", name)))
          << name << " was not clean under " << tool;
    }
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
