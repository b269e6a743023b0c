// Goal: sampling is a pure function with the documented order of ties, top-k and top-p.

#include "kernels/reference/sampling.h"

#include <cmath>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::kernels::reference {
namespace {

// Probabilities 1/2, 1/4, 1/8, 1/8 at temperature 1, best in the middle.
const std::vector<float> kLogits = {std::log(2.0f), std::log(1.0f), std::log(4.0f), std::log(1.0f)};

std::vector<int> Histogram(SamplingParams params, int draws) {
  std::vector<int> counts(kLogits.size());
  for (int i = 0; i < draws; ++i) ++counts[SampleRow(kLogits, params, i)];
  return counts;
}

TEST(Sample, TemperatureZeroTakesTheBestAndTheLowerIdOfEquals) {
  EXPECT_EQ(SampleRow(kLogits, {}, 0), 2);
  EXPECT_EQ(SampleRow(std::vector<float>{1, 3, 3, 2}, {}, 0), 1);
}

TEST(Sample, FrequenciesFollowTheSoftmax) {
  const std::vector<int> counts = Histogram({.temperature = 1.0f, .seed = 11}, 40000);
  EXPECT_NEAR(counts[2], 20000, 600);
  EXPECT_NEAR(counts[0], 10000, 600);
  EXPECT_NEAR(counts[1], 5000, 500);
  EXPECT_NEAR(counts[3], 5000, 500);
}

TEST(Sample, TopKKeepsTheLowerIdOfEquals) {
  const std::vector<int> counts = Histogram({.temperature = 5.0f, .top_k = 3, .seed = 3}, 4000);
  EXPECT_GT(counts[1], 0);
  EXPECT_EQ(counts[3], 0);
}

TEST(Sample, TopPKeepsTheShortestPrefixThatReachesIt) {
  const std::vector<int> half = Histogram({.temperature = 1.0f, .top_p = 0.49f, .seed = 4}, 2000);
  EXPECT_EQ(half[2], 2000);
  const std::vector<int> more = Histogram({.temperature = 1.0f, .top_p = 0.6f, .seed = 4}, 2000);
  EXPECT_EQ(more[2] + more[0], 2000);
  EXPECT_GT(more[0], 0);
}

TEST(Sample, DependsOnSeedAndIndexAlone) {
  const SamplingParams params{.temperature = 1.0f, .seed = 9};
  std::set<TokenId> seen;
  for (uint64_t t = 0; t < 50; ++t) {
    const TokenId token = SampleRow(kLogits, params, t);
    EXPECT_EQ(SampleRow(kLogits, params, t), token);
    seen.insert(token);
  }
  EXPECT_EQ(seen.size(), kLogits.size());
}

TEST(LogProb, IsOfTheUnmodifiedSoftmax) {
  EXPECT_NEAR(LogProbAt(kLogits, 2), std::log(0.5), 1e-6);
  EXPECT_NEAR(LogProbAt(kLogits, 3), std::log(0.125), 1e-6);
  EXPECT_NEAR(LogProbAt(std::vector<float>{500.0f, 0.0f}, 1), -500.0f, 1e-3);
}

}  // namespace
}  // namespace moebius::kernels::reference
