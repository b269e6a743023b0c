// Goal: a draw is a function of its own row and parameters, whatever stands beside it, in calls of
// any size and beside other kernels, launch after launch.

#include <array>
#include <cstdio>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/cuda/launch_comparison.h"
#include "tests/kernels/cuda/sampling_batch.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

class SamplingRowRuleTest : public GpuTest {};

// One row with every parameter set of the mixture, at several places of batches of every size.
// Returns how many results were compared and how many differ from the row's alone. Alone its logits
// are read one by one, in batches four at a time where the vocabulary allows it.
std::pair<int64_t, int64_t> CompareAtPlaces(int64_t vocab, bool batch_dependent) {
  Runner runner(512, 6004);
  const CompetingKernel competing;
  Prng random(5);
  int64_t compared = 0, different = 0;
  for (const Shape shape : {Shape::kNormal, Shape::kTies, Shape::kPeaked}) {
    const std::vector<float> mine = RandomRow(random, vocab, shape);
    Batch single;
    single.vocab = vocab;
    single.stride = 6004;
    for (const SamplingParams& params : Mixture()) single.Add(mine, params, 9);
    single.Add(mine, {}, 9);
    // Alone: each in a batch of its own, on another stride, which is no multiple of four.
    Drawn alone;
    for (int64_t i = 0; i < single.m(); ++i) {
      Batch one;
      one.vocab = vocab;
      one.stride = vocab / 4 * 4 + 1;
      one.Add(mine, single.params[static_cast<size_t>(i)], 9);
      const Drawn drawn = runner.Draw(one);
      alone.tokens.push_back(drawn.tokens[0]);
      alone.logprobs.push_back(drawn.logprobs[0]);
    }
    for (const int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 512}) {
      Batch batch;
      batch.vocab = vocab;
      batch.stride = 6004;
      std::vector<float> other = RandomRow(random, vocab, Shape::kWide);
      const SamplingParams others{.temperature = 0.8f, .top_p = 0.9f};
      std::vector<int64_t> places;
      for (int64_t i = 0; i < m; ++i) {
        if (i == m - 1 || random.Below(3) == 0) {
          batch.Add(mine, single.params[places.size() % single.params.size()], 9);
          places.push_back(i);
          continue;
        }
        other[random.Below(vocab)] = i % 3 == 0 ? std::nanf("") : i % 3 == 1 ? kInfinity : 3e38f;
        batch.Add(other, others, static_cast<uint64_t>(i));
      }
      Drawn drawn = runner.Draw(batch);
      if (batch_dependent) {
        drawn.logprobs = runner.LogSumsByBatch(batch);
        if (m == 1) std::fill(alone.logprobs.begin(), alone.logprobs.end(), drawn.logprobs[0]);
      }
      for (size_t j = 0; j < places.size(); ++j) {
        const auto at = static_cast<size_t>(places[j]);
        const size_t which = j % single.params.size();
        different += drawn.tokens[at] != alone.tokens[which];
        different += HashOf(std::vector<float>{drawn.logprobs[at]}) !=
                     HashOf(std::vector<float>{alone.logprobs[which]});
        compared += 2;
      }
    }
  }
  EXPECT_TRUE(competing.Runs());
  return {compared, different};
}

TEST_F(SamplingRowRuleTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  for (const int64_t vocab : {6000, 6001}) {
    const auto [compared, different] = CompareAtPlaces(vocab, false);
    EXPECT_EQ(different, 0) << vocab;
    std::printf("%ld results compared, vocabulary %ld\n", compared, vocab);
  }
}

TEST_F(SamplingRowRuleTest, ABatchDependentSumWouldBeFound) {
  EXPECT_GT(CompareAtPlaces(6000, true).second, 50);
}

// A batch in one call, against the same rows in calls of `chunk` rows that begin `shift` rows
// further on: every row at many places. A result is a function of its row's 129,280 logits.
TEST_F(SamplingRowRuleTest, ChunksAndPlacesDoNotReachTheBits) {
  constexpr int64_t kRows = 192, kShifts = 16, kVocab = 129280;
  Prng random(31);
  Batch batch;
  batch.vocab = batch.stride = kVocab;
  std::vector<SamplingParams> mixture = Mixture();
  mixture.push_back({});
  mixture.push_back({});
  const auto add = [&](int64_t i) {
    SamplingParams params = mixture[static_cast<size_t>(i) % mixture.size()];
    params.seed = static_cast<uint64_t>(i);
    batch.Add(
        RandomRow(random, kVocab, static_cast<Shape>(i / 3 % static_cast<int64_t>(Shape::kCount))),
        params, static_cast<uint64_t>(i));
  };
  for (int64_t i = 0; i < kRows; ++i) add(i);
  Runner runner(batch);
  const SampleParams all = runner.Prepare(batch);
  ASSERT_STATUS_OK(LaunchSample(all, nullptr));
  const Drawn expected = runner.Read(batch);
  const CompetingKernel competing;
  int64_t results = 0;
  for (const int64_t chunk : {1, 16, 63, 512}) {
    for (int64_t shift = 0; shift < kShifts; ++shift) {
      runner.Poison();
      for (int64_t row = shift; row < kRows; row += chunk) {
        SampleParams params = all;
        params.m = std::min(chunk, kRows - row);
        params.logits += row * kVocab;
        params.params += row;
        params.token_index += row;
        params.tokens += row;
        params.logprobs += row;
        ASSERT_STATUS_OK(LaunchSample(params, nullptr));
      }
      const Drawn drawn = runner.Read(batch);
      for (auto at = static_cast<size_t>(shift); at < static_cast<size_t>(kRows); ++at) {
        ASSERT_EQ(drawn.tokens[at], expected.tokens[at])
            << "row " << at << ", calls of " << chunk << " rows, " << shift << " rows on";
        ASSERT_EQ(HashOf(std::vector<float>{drawn.logprobs[at]}),
                  HashOf(std::vector<float>{expected.logprobs[at]}))
            << "row " << at << ", calls of " << chunk << " rows, " << shift << " rows on";
        results += 2;
      }
    }
  }
  EXPECT_TRUE(competing.Runs());
  std::printf("%ld results compared, of %ld logits\n", results, results / 2 * kVocab);
  EXPECT_GE(results, 20'000);
  EXPECT_GE(results / 2 * kVocab, 1'000'000'000);
}

TEST_F(SamplingRowRuleTest, LaunchesBesideACompetingKernelAgree) {
  const std::vector<SamplingParams> greedy(1), mixture = Mixture();
  struct Case {
    size_t rows;
    int64_t vocab;
    const std::vector<SamplingParams>& params;
  };
  // In clusters, and not.
  for (const Case& c :
       {Case{13, 40000, greedy}, {13, 40000, mixture}, {39, 20000, greedy}, {39, 20000, mixture}}) {
    SCOPED_TRACE(c.rows);
    Prng random(6);
    Batch batch;
    batch.vocab = batch.stride = c.vocab;
    for (size_t i = 0; i < c.rows; ++i) {
      batch.Add(RandomRow(random, c.vocab, i % 2 == 0 ? Shape::kNormal : Shape::kPeaked),
                c.params[i % c.params.size()], 5);
    }
    Runner runner(batch), other(batch);
    const std::array<SampleParams, 2> params = {runner.Prepare(batch), other.Prepare(batch)};
    const auto outputs = [&](const SampleParams& p) {
      return std::vector<OutputSpan>{{p.tokens, 4 * c.rows}, {p.logprobs, 4 * c.rows}};
    };
    ExpectEqualLaunches({outputs(params[0]), outputs(params[1])},
                        [&](int set, cudaStream_t stream) {
                          return LaunchSample(params[static_cast<size_t>(set)], stream);
                        });
  }
}

TEST_F(SamplingRowRuleTest, LogitsOfTheKernelInFrontAreWaitedFor) {
  const std::vector<SamplingParams> mixture = Mixture();
  for (const size_t rows : {size_t{3}, size_t{39}}) {  // in clusters, and not
    Prng random(10);
    Batch batch;
    batch.vocab = batch.stride = 20000;
    for (size_t i = 0; i < rows; ++i)
      batch.Add(RandomRow(random, batch.vocab, Shape::kNormal), mixture[i % mixture.size()], 5);
    Runner runner(batch);
    const SampleParams params = runner.Prepare(batch);
    ASSERT_STATUS_OK(LaunchSample(params, nullptr));
    const Drawn expected = runner.Read(batch);
    runner.Poison();
    const LateInput late(const_cast<float*>(params.logits),
                         rows * static_cast<size_t>(batch.stride) * sizeof(float));
    ASSERT_STATUS_OK(LaunchSample(params, nullptr));
    const Drawn found = runner.Read(batch);
    EXPECT_EQ(HashOf(found.tokens), HashOf(expected.tokens)) << rows << " rows";
    EXPECT_EQ(HashOf(found.logprobs), HashOf(expected.logprobs)) << rows << " rows";
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
