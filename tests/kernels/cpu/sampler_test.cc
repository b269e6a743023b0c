#include "kernels/cpu/sampler.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::kernels::cpu {
namespace {

TokenId Draw(const std::vector<float>& logits, const SamplingParams& params, uint64_t index) {
  std::vector<float> terms(logits.size());
  std::vector<Candidate> candidates(logits.size());
  return SampleToken(KernelsFor(BestTarget()), logits.data(), static_cast<int64_t>(logits.size()),
                     params, index, terms.data(), candidates.data());
}

// How often each token is drawn over many indices.
std::vector<double> Frequencies(const std::vector<float>& logits, const SamplingParams& params) {
  constexpr int kDraws = 20000;
  std::vector<double> frequency(logits.size());
  for (int i = 0; i < kDraws; ++i) frequency[Draw(logits, params, i)] += 1.0 / kDraws;
  return frequency;
}

TEST(Sampler, GreedyTakesTheLowerIdOfATie) {
  EXPECT_EQ(Draw({1, 3, 2, 3}, {}, 0), 1);
  const float nan = std::nanf("");
  EXPECT_EQ(Draw({nan, 3, nan, 3}, {}, 0), 1);
  EXPECT_EQ(Draw({nan, nan}, {}, 0), 0);
}

TEST(Sampler, DrawsFromTheSoftmaxAtATemperature) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f};
  const std::vector<double> frequency = Frequencies(logits, {.temperature = 2.0f, .seed = 3});
  double total = 0;
  for (const float logit : logits) total += std::exp(logit / 2);
  for (size_t i = 0; i < logits.size(); ++i) {
    EXPECT_NEAR(frequency[i], std::exp(logits[i] / 2) / total, 0.015) << i;
  }
}

TEST(Sampler, TopKKeepsTheBestAndTheLowerIdOfATie) {
  const std::vector<double> frequency =
      Frequencies({1, 2, 2, 2, 0}, {.temperature = 1.0f, .top_k = 2, .seed = 3});
  EXPECT_EQ(frequency[0] + frequency[3] + frequency[4], 0);
  EXPECT_NEAR(frequency[1], 0.5, 0.015);
}

TEST(Sampler, TopPKeepsTheShortestPrefix) {
  // Probabilities 0.5, 0.3, 0.2: top_p 0.7 needs the first two.
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  const std::vector<double> frequency =
      Frequencies(logits, {.temperature = 1.0f, .top_p = 0.7f, .seed = 4});
  EXPECT_EQ(frequency[0], 0);
  EXPECT_NEAR(frequency[1], 0.625, 0.015);
  // A prefix has at least one token.
  EXPECT_NEAR(Frequencies(logits, {.temperature = 1.0f, .top_p = 1e-9f, .seed = 4})[1], 1, 1e-9);
}

TEST(Sampler, IsAFunctionOfSeedAndIndex) {
  const std::vector<float> logits(100, 1.0f);
  int different = 0;
  for (uint64_t index = 0; index < 50; ++index) {
    const TokenId token = Draw(logits, {.temperature = 1.0f, .seed = 9}, index);
    EXPECT_EQ(token, Draw(logits, {.temperature = 1.0f, .seed = 9}, index));
    different += token != Draw(logits, {.temperature = 1.0f, .seed = 10}, index);
  }
  EXPECT_GT(different, 40);
}

TEST(Sampler, StaysInRangeOnPoison) {
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  for (const std::vector<float>& logits :
       {std::vector<float>{nan, nan, nan}, {infinity, 1, infinity}, {-infinity, -infinity, nan}}) {
    for (const SamplingParams& params :
         {SamplingParams{.temperature = 1.0f}, SamplingParams{.temperature = 1.0f, .top_k = 2},
          SamplingParams{.temperature = 1.0f, .top_p = 0.5f}}) {
      const TokenId token = Draw(logits, params, 1);
      EXPECT_GE(token, 0);
      EXPECT_LT(token, 3);
    }
  }
}

}  // namespace
}  // namespace moebius::kernels::cpu
