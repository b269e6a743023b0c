#include "attention_worker/most_likely_tokens.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::attention_worker {
namespace {

std::vector<TokenId> Top(const std::vector<float>& logits, uint32_t n) {
  std::vector<TokenId> ids(n, 77);
  MostLikelyTokens(logits.data(), static_cast<int64_t>(logits.size()), n, ids.data());
  return ids;
}

TEST(MostLikelyTokensTest, TiesGoToTheLowerId) {
  EXPECT_EQ(Top({1, 2, 2, 0, 2, 1}, 4), (std::vector<TokenId>{1, 2, 4, 0}));
}

TEST(MostLikelyTokensTest, NanIsNeverChosen) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Top({nan, 1, nan, 2}, 3), (std::vector<TokenId>{3, 1, -1}));
}

TEST(MostLikelyTokensTest, AgreesWithAStableSort) {
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
    ASSERT_EQ(Top(logits, n), order);
  }
}

}  // namespace
}  // namespace moebius::attention_worker
