// Goal: every variant of the gate, its ties and its masks, on numbers small enough to check by
// hand.

#include "kernels/reference/gate.h"

#include <cmath>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace moebius::kernels::reference {
namespace {

using testing::ElementsAre;

struct Choice {
  std::vector<uint32_t> experts;
  std::vector<float> weights;
};

Choice Select(const GateConfig& config, const std::vector<float>& logits,
              const std::vector<float>& bias = {}) {
  std::vector<ExpertId> experts(config.num_experts_per_tok);
  Choice choice;
  choice.weights.resize(experts.size());
  GateSelectRow(config, logits, bias, absl::MakeSpan(experts), absl::MakeSpan(choice.weights));
  for (const ExpertId id : experts) choice.experts.push_back(id.value());
  return choice;
}

float Sigmoid(float z) { return 1.0f / (1.0f + std::exp(-z)); }

GateConfig Sigmoid4(int32_t top_k) {
  return {.n_routed_experts = 4, .num_experts_per_tok = top_k, .routed_scaling_factor = 2.5f};
}

TEST(Gate, SigmoidWeightsAreNormalisedThenScaled) {
  const Choice choice = Select(Sigmoid4(2), {-1.0f, 2.0f, 0.5f, 1.0f});
  EXPECT_THAT(choice.experts, ElementsAre(1, 3));
  const float sum = Sigmoid(2) + Sigmoid(1);
  EXPECT_FLOAT_EQ(choice.weights[0], Sigmoid(2) / sum * 2.5f);
  EXPECT_FLOAT_EQ(choice.weights[1], Sigmoid(1) / sum * 2.5f);
}

TEST(Gate, BiasSelectsButNeverWeighs) {
  GateConfig config = Sigmoid4(1);
  config.norm_topk_prob = false;
  const Choice choice = Select(config, {-1.0f, 2.0f, 0.5f, 1.0f}, {5.0f, 0.0f, 0.0f, 0.0f});
  EXPECT_THAT(choice.experts, ElementsAre(0));
  EXPECT_FLOAT_EQ(choice.weights[0], Sigmoid(-1) * 2.5f);
}

TEST(Gate, OutputIsInAscendingExpertOrder) {
  EXPECT_THAT(Select(Sigmoid4(3), {0.0f, 1.0f, 2.0f, 3.0f}).experts, ElementsAre(1, 2, 3));
}

TEST(Gate, TiedExpertsGoToTheLowerId) {
  EXPECT_THAT(Select(Sigmoid4(2), {0.5f, 0.5f, 0.5f, 0.5f}).experts, ElementsAre(0, 1));
  EXPECT_THAT(Select(Sigmoid4(2), {0.5f, 3.0f, 0.5f, 0.5f}).experts, ElementsAre(0, 1));
  EXPECT_THAT(Select(Sigmoid4(3), {0.1f, 0.5f, 3.0f, 0.5f}).experts, ElementsAre(1, 2, 3));
}

GateConfig Groups(TopkMethod method, int32_t top_k) {
  return {.n_routed_experts = 8,
          .num_experts_per_tok = top_k,
          .n_group = 4,
          .topk_group = 1,
          .scoring_func = ScoringFunc::kSigmoid,
          .topk_method = method};
}

TEST(Gate, GroupsAreRankedByTheSumOfTheirTwoBest) {
  // Group 0 holds the best expert, group 2 the best pair.
  const std::vector<float> logits = {3.0f, -3.0f, 0.0f, 0.0f, 1.5f, 1.5f, 0.0f, 0.0f};
  EXPECT_THAT(Select(Groups(TopkMethod::kNoauxTc, 2), logits).experts, ElementsAre(4, 5));
  EXPECT_THAT(Select(Groups(TopkMethod::kGroupLimitedGreedy, 2), logits).experts,
              ElementsAre(0, 1));
}

TEST(Gate, GroupSumsAreOfBiasedScores) {
  const std::vector<float> logits = {1.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  const std::vector<float> bias = {0, 0, 0, 0, 0, 0, 0.4f, 0.4f};
  EXPECT_THAT(Select(Groups(TopkMethod::kNoauxTc, 2), logits, bias).experts, ElementsAre(6, 7));
}

TEST(Gate, TiedGroupsGoToTheLowerIndex) {
  const std::vector<float> logits = {0.0f, 0.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  EXPECT_THAT(Select(Groups(TopkMethod::kNoauxTc, 2), logits).experts, ElementsAre(2, 3));
}

TEST(Gate, AMaskedGroupLosesEvenAgainstNegativeBiasedScores) {
  // All biased scores of the kept group are negative: a mask of 0 instead of -infinity would pick
  // experts of other groups.
  const std::vector<float> logits(8, 0.0f);
  const std::vector<float> bias = {-2, -2, -1, -1, -2, -2, -2, -2};
  EXPECT_THAT(Select(Groups(TopkMethod::kNoauxTc, 2), logits, bias).experts, ElementsAre(2, 3));
}

TEST(Gate, SoftmaxScoresAreOverAllExperts) {
  GateConfig config{.n_routed_experts = 4,
                    .num_experts_per_tok = 2,
                    .scoring_func = ScoringFunc::kSoftmax,
                    .topk_method = TopkMethod::kGreedy,
                    .norm_topk_prob = false,
                    .routed_scaling_factor = 16.0f};
  const Choice choice =
      Select(config, {std::log(1.0f), std::log(4.0f), std::log(2.0f), std::log(1.0f)});
  EXPECT_THAT(choice.experts, ElementsAre(1, 2));
  EXPECT_FLOAT_EQ(choice.weights[0], 16.0f * 4 / 8);
  EXPECT_FLOAT_EQ(choice.weights[1], 16.0f * 2 / 8);
}

TEST(Gate, GreedyIgnoresGroups) {
  GateConfig config = Groups(TopkMethod::kGreedy, 2);
  EXPECT_THAT(Select(config, {3, 0, 0, 0, 0, 0, 0, 2}).experts, ElementsAre(0, 7));
}

TEST(Gate, LargeLogitsDoNotOverflow) {
  GateConfig config = Groups(TopkMethod::kGreedy, 1);
  config.scoring_func = ScoringFunc::kSoftmax;
  config.norm_topk_prob = false;
  const Choice choice = Select(config, {1000, -1000, 0, 0, 0, 0, 0, 0});
  EXPECT_FLOAT_EQ(choice.weights[0], 1.0f);
}

}  // namespace
}  // namespace moebius::kernels::reference
