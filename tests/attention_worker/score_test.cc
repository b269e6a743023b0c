#include "attention_worker/score.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::attention_worker {
namespace {

ScoreRow RowOf(const std::vector<float>& logits) {
  ScoreRow row;
  row.logits = logits.data();
  row.vocab = static_cast<int64_t>(logits.size());
  row.best = static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(double{logit} - logits[row.best]);
  row.best_logprob = static_cast<float>(-std::log(sum));
  return row;
}

TEST(ScoreTest, LogProbIsLogSoftmax) {
  const std::vector<float> logits = {0.5f, -1.25f, 3.0f, 2.875f, 0.0f};
  const ScoreRow row = RowOf(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(double{logit});
  double total = 0;
  for (TokenId id = 0; id < 5; ++id) {
    EXPECT_NEAR(row.LogProb(id), logits[id] - std::log(sum), 1e-6);
    total += std::exp(row.LogProb(id));
  }
  EXPECT_NEAR(total, 1.0, 1e-5);
  EXPECT_EQ(row.LogProb(row.best), row.best_logprob);  // the backend's own bits
}

TEST(ScoreTest, TiesGoToTheLowerId) {
  const std::vector<float> logits = {1, 2, 2, 0, 2, 1};
  std::vector<TokenId> ids(4);
  std::vector<float> logprobs(4);
  TopLogProbs(RowOf(logits), 4, ids.data(), logprobs.data());
  EXPECT_EQ(ids, (std::vector<TokenId>{1, 2, 4, 0}));
  EXPECT_EQ(logprobs[0], logprobs[2]);
}

TEST(ScoreTest, NanIsNeverChosen) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> logits = {nan, 1, nan, 2};
  ScoreRow row{logits.data(), 4, 3, -0.25f};
  std::vector<TokenId> ids(3);
  std::vector<float> logprobs(3);
  TopLogProbs(row, 3, ids.data(), logprobs.data());
  EXPECT_EQ(ids, (std::vector<TokenId>{3, 1, -1}));
}

TEST(ScoreTest, AgreesWithAStableSort) {
  Prng prng(3);
  for (int round = 0; round < 300; ++round) {
    std::vector<float> logits(1 + prng.Below(60));
    // Few distinct values: many ties.
    for (float& logit : logits) logit = static_cast<float>(prng.Below(9)) - 4;
    const auto n = static_cast<uint32_t>(prng.Below(logits.size() + 1));
    std::vector<TokenId> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });
    order.resize(n);
    std::vector<TokenId> ids(n);
    std::vector<float> logprobs(n);
    TopLogProbs(RowOf(logits), n, ids.data(), logprobs.data());
    ASSERT_EQ(ids, order);
  }
}

}  // namespace
}  // namespace moebius::attention_worker
