// Goal: the GPU draws the reference's tokens wherever rounding cannot decide, for every mixture of
// parameters and every shape of distribution.

#include "kernels/cuda/sampling/sampling.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/reference/sampling.h"
#include "tests/kernels/cuda/sampling_batch.h"

namespace moebius::kernels::cuda {
namespace {

Drawn DrawOnGpu(const Batch& batch) { return Runner(batch).Draw(batch); }

double LogProbExactly(absl::Span<const float> logits, TokenId token) {
  const double maximum = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float z : logits) sum += std::exp(z - maximum);
  return logits[static_cast<size_t>(token)] - maximum - std::log(sum);
}

// kernels/reference's definition in double. `distance`: how far the decisions of top-p and of the
// draw are from falling the other way, as a part of all mass.
TokenId DrawExactly(absl::Span<const float> logits, const SamplingParams& params, uint64_t index,
                    double& distance) {
  std::vector<TokenId> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](TokenId a, TokenId b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < order.size())
    order.resize(static_cast<size_t>(params.top_k));
  const double maximum = logits[static_cast<size_t>(order[0])];
  std::vector<double> sums;
  double total = 0;
  for (const TokenId id : order) {
    total += std::exp((logits[static_cast<size_t>(id)] - maximum) / params.temperature);
    sums.push_back(total);
  }
  distance = 1;
  const auto consider = [&](size_t at, double target) {
    distance = std::min(distance, std::fabs(sums[at] - target) / total);
    if (at > 0) distance = std::min(distance, std::fabs(sums[at - 1] - target) / total);
  };
  size_t kept = sums.size() - 1;
  if (params.top_p < 1) {
    const double target = static_cast<double>(params.top_p) * total;
    kept = static_cast<size_t>(std::lower_bound(sums.begin(), sums.end(), target) - sums.begin());
    consider(kept, target);
  }
  const double target = ToUnitFloat(CounterDraw(params.seed, 0, index)) * sums[kept];
  const auto drawn =
      static_cast<size_t>(std::upper_bound(sums.begin(), sums.end(), target) - sums.begin());
  consider(std::min(drawn, sums.size() - 1), target);
  return order[std::min(drawn, kept)];
}

class SamplingTest : public GpuTest {};

TEST_F(SamplingTest, DrawsTheReferencesTokens) {
  Prng random(1);
  int64_t rows = 0, unclear = 0, reference_unclear = 0;
  double largest_error = 0;
  // Up to 15 rows take clusters, more do without. Large rows are costly on the host: few shapes.
  constexpr int64_t kAll = static_cast<int64_t>(Shape::kCount);
  for (const auto& [vocab, stride, repeats, shapes] :
       {std::array<int64_t, 4>{1, 1, 1, kAll},
        {2, 4, 2, kAll},
        {31, 37, 4, kAll},
        {100, 100, 4, kAll},
        {1000, 1001, 3, kAll},
        {4096, 4096, 3, kAll},
        {8193, 8196, 2, kAll},
        {129280, 129280, 1, 2},
        {163840, 163843, 1, 2},
        {kSamplingMaxVocab, kSamplingMaxVocab, 1, 1}}) {
    for (int64_t repeat = 0; repeat < repeats; ++repeat) {
      Batch batch;
      batch.vocab = vocab;
      batch.stride = stride;
      int64_t shape = repeat;
      for (SamplingParams params : Mixture()) {
        params.seed = random.Next();
        for (int64_t i = 0; i < shapes; ++i) {
          batch.Add(RandomRow(random, vocab, static_cast<Shape>(shape++ % kAll)), params,
                    random.Below(1000));
        }
      }
      const Drawn drawn = DrawOnGpu(batch);
      for (int64_t i = 0; i < batch.m(); ++i) {
        const auto at = static_cast<size_t>(i);
        const SamplingParams& params = batch.params[at];
        double distance = 0;
        const TokenId exact = DrawExactly(batch.row(i), params, batch.token_index[at], distance);
        const std::string what = absl::StrCat("vocab ", vocab, ", row ", i, ", temperature ",
                                              params.temperature, ", top_k ", params.top_k,
                                              ", top_p ", params.top_p, ", distance ", distance);
        ++rows;
        ASSERT_GE(drawn.tokens[at], 0) << what;
        ASSERT_LT(drawn.tokens[at], vocab) << what;
        if (distance > 1e-5) {
          EXPECT_EQ(drawn.tokens[at], exact) << what;
        } else {
          ++unclear;
        }
        // The reference sums in float32, one after the other.
        if (distance > 3e-3) {
          EXPECT_EQ(drawn.tokens[at],
                    reference::SampleRow(batch.row(i), params, batch.token_index[at]))
              << what;
        } else {
          ++reference_unclear;
        }
        const double logprob = LogProbExactly(batch.row(i), drawn.tokens[at]);
        const double error = std::fabs(drawn.logprobs[at] - logprob);
        largest_error = std::max(largest_error, error / std::max(1.0, std::fabs(logprob) / 8));
        EXPECT_LT(error, 2e-6 * std::max(1.0, std::fabs(logprob) / 8)) << what;
      }
    }
  }
  std::printf("%ld rows, %ld too close to call (%ld for the reference), logprob within %.2g\n",
              rows, unclear, reference_unclear, largest_error);
  EXPECT_LT(unclear, rows / 10);
}

TEST_F(SamplingTest, FrequenciesAreTheProbabilities) {
  // 4,000 draws from one row whose token 7 * i has probability 2^-(i + 1).
  Batch batch;
  batch.vocab = batch.stride = 500;
  std::vector<float> row(500, -kInfinity);
  for (int i = 0; i < 40; ++i)
    row[static_cast<size_t>(7 * i)] = -0.69314718f * static_cast<float>(i);
  for (uint64_t i = 0; i < 4000; ++i) batch.Add(row, {.temperature = 1.0f, .seed = 77}, i);
  const Drawn drawn = DrawOnGpu(batch);
  std::vector<int> counts(500);
  for (const TokenId token : drawn.tokens) ++counts[static_cast<size_t>(token)];
  for (int i = 0; i < 6; ++i) {
    const double expected = 4000.0 / (2 << i);
    EXPECT_NEAR(counts[static_cast<size_t>(7 * i)], expected, 5 * std::sqrt(expected)) << i;
  }
}

TEST_F(SamplingTest, GreedyIsTheReferencesAndTakesTheLowerIdOfATie) {
  Prng random(2);
  for (const int64_t vocab : {1, 31, 4096, 129280}) {
    Batch batch;
    batch.vocab = vocab;
    batch.stride = vocab + 5;
    for (int shape = 0; shape < static_cast<int>(Shape::kCount); ++shape) {
      batch.Add(RandomRow(random, vocab, static_cast<Shape>(shape)), {.top_k = 3, .top_p = 0.5f},
                random.Next());
    }
    const Drawn drawn = DrawOnGpu(batch);
    for (int64_t i = 0; i < batch.m(); ++i) {
      EXPECT_EQ(drawn.tokens[static_cast<size_t>(i)],
                reference::SampleRow(batch.row(i), batch.params[static_cast<size_t>(i)], 0))
          << "vocab " << vocab << ", row " << i;
    }
  }
}

TEST_F(SamplingTest, PoisonIsChosenLastAndNeverLeavesTheRow) {
  const float nan = std::nanf("");
  Batch batch;
  batch.vocab = 1000;
  batch.stride = 1000;
  Prng random(3);
  std::vector<TokenId> expected;  // -1: any that is no NaN
  for (const SamplingParams& params : Mixture()) {
    std::vector<float> row = RandomRow(random, 1000, Shape::kNormal);
    batch.Add(std::vector<float>(1000, nan), params, 1);
    expected.push_back(0);
    batch.Add(std::vector<float>(1000, -kInfinity), params, 1);
    expected.push_back(0);
    for (size_t i = 0; i < 1000; ++i) {
      if (i % 3 != 1) row[i] = i % 3 == 0 ? nan : -kInfinity;
    }
    batch.Add(row, params, 1);
    expected.push_back(-1);
    row[700] = row[900] = kInfinity;
    batch.Add(row, params, 1);
    expected.push_back(700);
    batch.Add(row, {}, 1);
    expected.push_back(700);
    std::fill(row.begin(), row.end(), nan);
    row[999] = -80.0f;
    batch.Add(row, params, 1);
    expected.push_back(999);
    batch.Add(row, {}, 1);
    expected.push_back(999);
  }
  const Drawn drawn = DrawOnGpu(batch);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] >= 0) {
      EXPECT_EQ(drawn.tokens[i], expected[i]) << i;
    } else {
      ASSERT_GE(drawn.tokens[i], 0) << i;
      ASSERT_LT(drawn.tokens[i], 1000) << i;
      EXPECT_EQ(drawn.tokens[i] % 3, 1) << i << ": neither NaN nor -infinity";
    }
    EXPECT_TRUE(std::isnan(drawn.logprobs[i])) << i;
  }
}

TEST_F(SamplingTest, AnInfiniteTemperatureDrawsAsTheLargestOne) {
  constexpr int64_t kVocab = 1001;
  Prng random(15);
  std::vector<float> row = RandomRow(random, kVocab, Shape::kNormal);
  row[7] = -INFINITY;
  std::array<Batch, 2> batches;
  for (Batch& batch : batches) batch.vocab = batch.stride = kVocab;
  for (uint64_t i = 0; i < 200; ++i) {
    batches[0].Add(row, {.temperature = INFINITY, .seed = 3}, i);
    batches[1].Add(row, {.temperature = FLT_MAX, .seed = 3}, i);
  }
  const Drawn infinite = Runner(batches[0]).Draw(batches[0]);
  const Drawn largest = Runner(batches[1]).Draw(batches[1]);
  EXPECT_EQ(HashOf(infinite.tokens), HashOf(largest.tokens));
  EXPECT_EQ(HashOf(infinite.logprobs), HashOf(largest.logprobs));
  for (const TokenId token : infinite.tokens)
    EXPECT_LT(static_cast<int64_t>(token), kVocab) << "a token that does not exist";
}

TEST_F(SamplingTest, GivenTokensHaveTheBitsThatADrawHas) {
  Prng random(4);
  for (const int64_t vocab : {1, 31, 5000, 129280}) {
    Batch batch;
    batch.vocab = vocab;
    batch.stride = vocab + 4;
    for (const SamplingParams& params : Mixture()) {
      batch.Add(
          RandomRow(random, vocab, static_cast<Shape>(batch.m() % static_cast<int>(Shape::kCount))),
          params, random.Next());
    }
    const Drawn drawn = DrawOnGpu(batch);
    std::vector<TokenId> given;
    for (const TokenId token : drawn.tokens) {
      given.insert(given.end(), {token, -1, static_cast<TokenId>(vocab - 1), token,
                                 static_cast<TokenId>(vocab), -7});
    }
    const std::vector<float> logprobs = Runner(batch).Logprobs(batch, given);
    for (size_t i = 0; i < drawn.tokens.size(); ++i) {
      const auto bits = [](float value) { return HashOf(std::vector<float>{value}); };
      EXPECT_EQ(bits(logprobs[6 * i]), bits(drawn.logprobs[i])) << vocab << ", row " << i;
      EXPECT_EQ(bits(logprobs[6 * i + 3]), bits(drawn.logprobs[i]));
      EXPECT_EQ(bits(logprobs[6 * i + 1]), bits(0.0f));
      EXPECT_TRUE(std::isnan(logprobs[6 * i + 4]) && std::isnan(logprobs[6 * i + 5]));
      const double exact =
          LogProbExactly(batch.row(static_cast<int64_t>(i)), static_cast<TokenId>(vocab - 1));
      if (!std::isinf(exact)) {
        EXPECT_NEAR(logprobs[6 * i + 2], exact, 2e-6 * std::max(1.0, std::fabs(exact) / 8));
      }
    }
  }
}

TEST_F(SamplingTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  EXPECT_TRUE(LaunchSample({}, nullptr).ok()) << "no rows";
  EXPECT_TRUE(LaunchTokenLogprobs({}, nullptr).ok()) << "no rows";
  const DeviceBuffer<uint64_t> some(64);
  SampleParams good;
  good.m = 1;
  good.vocab = good.logits_stride = 64;
  good.logits = reinterpret_cast<const float*>(some.get());
  good.params = reinterpret_cast<const SamplingParams*>(some.get());
  good.token_index = some.get();
  good.tokens = reinterpret_cast<TokenId*>(some.get());
  good.logprobs = reinterpret_cast<float*>(some.get());
  struct Case {
    const char* name;
    void (*spoil)(SampleParams&);
  };
  for (const Case& c : {
           Case{"m is -1", [](SampleParams& p) { p.m = -1; }},
           Case{"vocab is 0", [](SampleParams& p) { p.vocab = 0; }},
           Case{"vocab is 400001", [](SampleParams& p) { p.vocab = p.logits_stride = 400001; }},
           Case{"logits_stride is 63", [](SampleParams& p) { p.logits_stride = 63; }},
           Case{"logits is null", [](SampleParams& p) { p.logits = nullptr; }},
           Case{"params is null", [](SampleParams& p) { p.params = nullptr; }},
           Case{"token_index is null", [](SampleParams& p) { p.token_index = nullptr; }},
           Case{"tokens is null", [](SampleParams& p) { p.tokens = nullptr; }},
           Case{"logprobs is null", [](SampleParams& p) { p.logprobs = nullptr; }},
       }) {
    SampleParams params = good;
    c.spoil(params);
    const absl::Status status = LaunchSample(params, nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.name;
    EXPECT_NE(status.message().find(c.name), absl::string_view::npos) << status.message();
  }
  TokenLogprobsParams given;
  given.m = 1;
  given.vocab = given.logits_stride = 64;
  given.logits = good.logits;
  given.per_row = 1;
  const absl::Status status = LaunchTokenLogprobs(given, nullptr);
  EXPECT_NE(status.message().find("tokens is null"), absl::string_view::npos) << status.message();
}

}  // namespace
}  // namespace moebius::kernels::cuda
