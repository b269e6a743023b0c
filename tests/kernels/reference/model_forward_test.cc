// Goal: the reference is right. Method: small random models, compared with what transformers
// (and, for the MTP layer, a second implementation) computed in float32; tools/golden/README.md.

#include "kernels/reference/model_forward.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "gtest/gtest.h"
#include "kernels/reference/sampling.h"
#include "tests/kernels/reference/golden_files.h"

namespace moebius::kernels::reference {
namespace {

// Both sides compute in float32, in different orders.
constexpr double kTight = 2e-4;

double WorstDifference(const Rows& got, const Rows& expected) {
  EXPECT_EQ(got.count, expected.count);
  EXPECT_EQ(got.dim, expected.dim);
  double worst = 0;
  for (size_t i = 0; i < std::min(got.values.size(), expected.values.size()); ++i) {
    const double difference = std::abs(double{got.values[i]} - expected.values[i]);
    if (!(difference <= worst)) worst = difference;  // a NaN stays
  }
  return worst;
}

// Steps of `run` at which the teacher-forced model has the same best token, up to compare_steps.
int64_t AgreeingSteps(const ModelForward& model, const GoldenGreedy& run, Rounding rounding) {
  std::vector<TokenId> ids = run.prompt;
  ids.insert(ids.end(), run.token_ids.begin(), run.token_ids.end());
  const ForwardResult result = model.Forward(ids, rounding);
  for (int64_t step = 0; step < run.compare_steps; ++step) {
    const int64_t row = static_cast<int64_t>(run.prompt.size()) - 1 + step;
    if (SampleRow(result.logits[row], SamplingParams{}, 0) != run.token_ids[step]) return step;
  }
  return run.compare_steps;
}

class GoldenTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    golden_ = LoadGolden(GetParam());
    auto model = ModelForward::Load(GoldenDir(GetParam()));
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }
  GoldenModel golden_;
  std::unique_ptr<ModelForward> model_;
};

INSTANTIATE_TEST_SUITE_P(Models, GoldenTest, testing::ValuesIn(GoldenModelNames()),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST_P(GoldenTest, Float32HiddenStatesOfEveryLayerEqualTransformers) {
  const GoldenSequence& sequence = golden_.sequences[golden_.detailed];
  const ForwardResult result = model_->Forward(sequence.token_ids, Rounding::kFloat32);
  ASSERT_EQ(result.hidden_states.size(), golden_.hidden_states.size());
  for (size_t layer = 0; layer < golden_.hidden_states.size(); ++layer) {
    EXPECT_LT(WorstDifference(result.hidden_states[layer], golden_.hidden_states[layer]), kTight)
        << "after " << layer << " layers";
  }
  EXPECT_LT(WorstDifference(result.final_hidden, golden_.final_hidden), kTight);
  EXPECT_LT(WorstDifference(result.logits, golden_.logits), kTight);
}

TEST_P(GoldenTest, Float32LogProbsEqualTransformers) {
  for (const GoldenSequence& sequence : golden_.sequences) {
    const ForwardResult result = model_->Forward(sequence.token_ids, Rounding::kFloat32);
    const std::vector<float> next = NextLogProbs(result.logits, sequence.token_ids, 1);
    for (size_t i = 0; i < next.size(); ++i) {
      ASSERT_NEAR(next[i], sequence.next_logprob[i], kTight) << "position " << i;
    }
    for (size_t i = 0; i < sequence.token_ids.size(); ++i) {
      for (size_t j = 0; j < sequence.top_ids[i].size(); ++j) {
        const float logprob = LogProbAt(result.logits[i], sequence.top_ids[i][j]);
        ASSERT_NEAR(logprob, sequence.top_logprob[i][j], kTight) << "position " << i;
      }
    }
  }
}

TEST_P(GoldenTest, ServingRoundingStaysWithinTheBound) {
  const GoldenScores scores = LoadGoldenScores();
  double bound = scores.bound_per_std;
  if (golden_.has_quantizing_reference) {
    bound = scores.fp8_factor * golden_.quantizing_per_std;
    std::printf("quantising reference: %.5f per unit of logit std\n", golden_.quantizing_per_std);
  }
  const double score = ScorePerStd(*model_, golden_, Rounding::kServing);
  std::printf("%s: %.5f per unit of logit std, bound %.5f\n", GetParam().c_str(), score, bound);
  EXPECT_LT(score, bound);
  EXPECT_GT(score, 1e-5);  // serving must not be float32 in disguise
}

TEST_P(GoldenTest, GreedyContinuationsAgreeUntilTheReferenceItselfIsUnsure) {
  for (const GoldenGreedy& run : golden_.greedy) {
    EXPECT_EQ(AgreeingSteps(*model_, run, Rounding::kFloat32), run.compare_steps);
  }
  const auto& served =
      golden_.has_quantizing_reference ? golden_.quantizing_greedy : golden_.greedy;
  for (const GoldenGreedy& run : served) {
    EXPECT_EQ(AgreeingSteps(*model_, run, Rounding::kServing), run.compare_steps)
        << "prompt of " << run.prompt.size();
  }
}

TEST_P(GoldenTest, MtpEqualsTheSecondImplementation) {
  if (!golden_.has_mtp) GTEST_SKIP() << "no MTP layer";
  const std::vector<TokenId>& ids = golden_.sequences[golden_.detailed].token_ids;
  const MtpResult exact = model_->Mtp(ids, golden_.final_hidden, Rounding::kFloat32);
  EXPECT_LT(WorstDifference(exact.hidden, golden_.mtp_hidden), kTight);
  EXPECT_LT(WorstDifference(exact.logits, golden_.mtp_logits), kTight);
  const std::vector<float> next = NextLogProbs(exact.logits, ids, 2);
  ASSERT_EQ(next.size(), golden_.mtp_next_logprob.size());
  for (size_t i = 0; i < next.size(); ++i) {
    EXPECT_NEAR(next[i], golden_.mtp_next_logprob[i], kTight);
  }
}

TEST(Golden, AtLeast200GreedyStepsAreCompared) {
  int64_t steps = 0;
  for (const std::string& name : GoldenModelNames()) {
    for (const GoldenGreedy& run : LoadGolden(name).greedy) steps += run.compare_steps;
  }
  std::printf("%ld greedy steps compared\n", static_cast<long>(steps));
  EXPECT_GE(steps, 200);
  EXPECT_EQ(steps, LoadGoldenScores().greedy_compare_steps);
}

TEST(Golden, Fp8ExpertInputsCostWhatTheQuantisingReferenceSays) {
  for (const char* name : {"v3-fp8", "v31-fp8"}) {
    SCOPED_TRACE(name);
    const GoldenModel golden = LoadGolden(name);
    const auto model = ModelForward::Load(GoldenDir(name));
    ASSERT_TRUE(model.ok()) << model.status();
    double sum = 0;
    int64_t count = 0;
    for (size_t s = 0; s < golden.sequences.size(); ++s) {
      const std::vector<TokenId>& ids = golden.sequences[s].token_ids;
      const ForwardResult result = (*model)->Forward(ids, Rounding::kQuantizedExperts);
      const std::vector<float> got = NextLogProbs(result.logits, ids, 1);
      for (size_t i = 0; i < got.size(); ++i) {
        sum += std::abs(got[i] - golden.quantizing_next_logprob[s][i]);
        ++count;
      }
    }
    // A last-bit difference can move a value across the edge of two e4m3 codes: agreement in the
    // mean, far below what quantising itself costs.
    EXPECT_LT(sum / count / golden.logit_std, 0.1 * golden.quantizing_per_std);
    EXPECT_NEAR(ScorePerStd(**model, golden, Rounding::kQuantizedExperts),
                golden.quantizing_per_std, 0.1 * golden.quantizing_per_std);
  }
}

TEST(ModelForward, APrefixHasTheBitsOfTheWholeSequence) {
  const auto model = ModelForward::Load(GoldenDir("v3-groups"));
  ASSERT_TRUE(model.ok()) << model.status();
  const std::vector<TokenId> ids = LoadGolden("v3-groups").sequences[1].token_ids;
  const ForwardResult whole = (*model)->Forward(ids, Rounding::kServing);
  const ForwardResult part =
      (*model)->Forward(absl::MakeConstSpan(ids).first(9), Rounding::kServing);
  for (int64_t t = 0; t < 9; ++t) EXPECT_EQ(part.logits[t], whole.logits[t]);
}

TEST(ModelForward, GreedyRepeatsTheGoldenContinuation) {
  const auto model = ModelForward::Load(GoldenDir("kimi-k2"));
  ASSERT_TRUE(model.ok()) << model.status();
  const GoldenGreedy run = LoadGolden("kimi-k2").greedy[0];
  const std::vector<TokenId> got = (*model)->Greedy(run.prompt, 4, Rounding::kFloat32);
  EXPECT_EQ(got, std::vector<TokenId>(run.token_ids.begin(), run.token_ids.begin() + 4));
}

}  // namespace
}  // namespace moebius::kernels::reference
