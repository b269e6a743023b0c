// Goal: the served model computes what transformers computes. Method: every golden model is scored
// and continued by a whole cluster in one process, against float32 log-probabilities (BF16 files)
// and the quantising reference (FP8).

#include <cmath>
#include <cstdio>
#include <filesystem>

#include "gtest/gtest.h"
#include "services/common/local_engine.h"
#include "tests/kernels/reference/golden_files.h"

namespace moebius::services {
namespace {

using kernels::reference::GoldenGreedy;
using kernels::reference::GoldenModel;

std::unique_ptr<LocalEngine> Open(const std::string& dir) {
  LocalEngineOptions options;
  options.experts = 2;
  absl::StatusOr<std::unique_ptr<LocalEngine>> engine = LocalEngine::Open(dir, options);
  EXPECT_TRUE(engine.ok()) << engine.status();
  return *std::move(engine);
}

TEST(Score, MatchesTransformersOnEveryGoldenModel) {
  const kernels::reference::GoldenScores scores = kernels::reference::LoadGoldenScores();
  int64_t compared = 0;
  for (const std::string& name : kernels::reference::GoldenModelNames()) {
    const GoldenModel golden = kernels::reference::LoadGolden(name);
    std::unique_ptr<LocalEngine> engine = Open(kernels::reference::GoldenDir(name));
    double difference = 0;
    int64_t positions = 0;
    for (const auto& sequence : golden.sequences) {
      const auto result = engine->Score(sequence.token_ids, 5);
      ASSERT_TRUE(result.ok()) << result.status();
      ASSERT_EQ(result->size(), sequence.token_ids.size());
      for (size_t i = 0; i + 1 < sequence.token_ids.size(); ++i) {
        difference += std::abs((*result)[i].next_logprob - sequence.next_logprob[i]);
        ++positions;
      }
    }
    const double per_std = difference / static_cast<double>(positions) / golden.logit_std;
    const double bound = golden.has_quantizing_reference
                             ? scores.fp8_factor * golden.quantizing_per_std
                             : scores.bound_per_std;
    if (golden.has_quantizing_reference) {
      std::printf("%-10s %.4f per unit of logit std (quantising reference %.4f, bound %.4f)\n",
                  name.c_str(), per_std, golden.quantizing_per_std, bound);
    } else {
      std::printf("%-10s %.4f per unit of logit std (bound %.4f)\n", name.c_str(), per_std, bound);
    }
    EXPECT_LT(per_std, bound) << name;

    const std::vector<GoldenGreedy>& greedy =
        golden.has_quantizing_reference ? golden.quantizing_greedy : golden.greedy;
    for (const GoldenGreedy& expected : greedy) {
      attention_worker::Submit submit;
      submit.prompt = expected.prompt;
      submit.max_tokens = expected.token_ids.size();
      submit.ignore_eos = true;
      const auto result = engine->Generate(std::move(submit), nullptr);
      ASSERT_TRUE(result.ok()) << result.status();
      for (size_t i = 0; i < expected.token_ids.size() && expected.margin[i] >= 0.05; ++i) {
        ASSERT_EQ(result->events[i].token, expected.token_ids[i]) << name << " step " << i;
        ++compared;
      }
    }
  }
  std::printf("%ld greedy steps compared\n", static_cast<long>(compared));
  EXPECT_GE(compared, 200);
}

TEST(Score, TheTrainedCheckpointPredictsEnglish) {
  const std::string dir = std::string(MOEBIUS_SOURCE_DIR) + "/models/moebius-tiny";
  std::unique_ptr<LocalEngine> engine = Open(dir);
  const std::string text =
      "It was a bright morning in spring, and the whole family had gone into the garden after "
      "breakfast to look at the "
      "flowers. \"I do not know,\" said the old man, \"whether we shall see him again before the "
      "end of the week.\"";
  auto ids = engine->host().tokenizer->Encode(text, model::Tokenizer::AddedTokens::kIgnore);
  ASSERT_TRUE(ids.ok());
  ids->insert(ids->begin(), 0);
  const auto scores = engine->Score(*ids, 1);
  ASSERT_TRUE(scores.ok()) << scores.status();
  double nats = 0;
  for (size_t i = 0; i + 1 < scores->size(); ++i) nats -= (*scores)[i].next_logprob;
  const double bits_per_byte = nats / std::log(2.0) / static_cast<double>(text.size());
  std::printf("%.3f bits per byte on a sentence that no corpus holds\n", bits_per_byte);
  // A uniform guess over 4,096 ids would be above 3; a model that lost a layer or its experts is
  // far above 2.
  EXPECT_LT(bits_per_byte, 2.0);
}

}  // namespace
}  // namespace moebius::services
