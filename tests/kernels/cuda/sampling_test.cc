// Goal: the GPU draws the reference's tokens wherever rounding cannot decide, for every mixture of
// parameters and every shape of distribution, and a result is a function of its own row.

#include "kernels/cuda/sampling/sampling.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/reference/sampling.h"
#include "tests/kernels/cuda/batch_dependent_choice.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/launch_comparison.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Batch {
  int64_t vocab = 0;
  int64_t stride = 0;
  std::vector<float> logits;  // [m, stride]
  std::vector<SamplingParams> params;
  std::vector<uint64_t> token_index;
  int64_t m() const { return static_cast<int64_t>(params.size()); }
  absl::Span<const float> row(int64_t i) const {
    return {&logits[static_cast<size_t>(i * stride)], static_cast<size_t>(vocab)};
  }
  void Add(const std::vector<float>& row, const SamplingParams& p, uint64_t index) {
    logits.insert(logits.end(), row.begin(), row.end());
    // Beyond vocab there is what would win if it were read.
    logits.resize(logits.size() + static_cast<size_t>(stride - vocab), kInfinity);
    params.push_back(p);
    token_index.push_back(index);
  }
};

struct Drawn {
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;
};

// Buffers for batches, allocated once: freeing device memory waits for all kernels.
class Runner {
 public:
  Runner(int64_t rows, int64_t stride)
      : logits_(static_cast<size_t>(rows * stride)),
        params_(static_cast<size_t>(rows)),
        index_(static_cast<size_t>(rows)),
        tokens_(static_cast<size_t>(rows)),
        logprobs_(static_cast<size_t>(rows)),
        given_(static_cast<size_t>(rows * kGiven)),
        given_logprobs_(static_cast<size_t>(rows * kGiven)) {}
  explicit Runner(const Batch& batch) : Runner(batch.m(), batch.stride) {}

  SampleParams Prepare(const Batch& batch) {
    logits_.Upload(batch.logits);
    params_.Upload(batch.params);
    index_.Upload(batch.token_index);
    Poison();
    SampleParams p;
    p.m = batch.m();
    p.vocab = batch.vocab;
    p.logits_stride = batch.stride;
    p.logits = logits_.get();
    p.params = params_.get();
    p.token_index = index_.get();
    p.tokens = tokens_.get();
    p.logprobs = logprobs_.get();
    return p;
  }
  void Poison() {
    tokens_.Poison();
    logprobs_.Poison();
  }
  Drawn Read(const Batch& batch) const {
    Drawn drawn{tokens_.Download(), logprobs_.Download()};
    drawn.tokens.resize(batch.params.size());
    drawn.logprobs.resize(batch.params.size());
    return drawn;
  }
  Drawn Draw(const Batch& batch) {
    const absl::Status status = LaunchSample(Prepare(batch), nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "Sample");
    return Read(batch);
  }
  // `given`: kGiven tokens a row.
  std::vector<float> Logprobs(const Batch& batch, const std::vector<TokenId>& given) {
    logits_.Upload(batch.logits);
    given_.Upload(given);
    given_logprobs_.Poison();
    TokenLogprobsParams p;
    p.m = batch.m();
    p.vocab = batch.vocab;
    p.logits_stride = batch.stride;
    p.logits = logits_.get();
    p.per_row = kGiven;
    p.tokens = given_.get();
    p.logprobs = given_logprobs_.get();
    const absl::Status status = LaunchTokenLogprobs(p, nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "TokenLogprobs");
    std::vector<float> logprobs = given_logprobs_.Download();
    logprobs.resize(given.size());
    return logprobs;
  }
  // The deliberate mistake, for rows without a stride.
  std::vector<float> LogSumsByBatch(const Batch& batch) {
    logits_.Upload(batch.logits);
    ExpectCudaOk(LaunchLogSumByBatch(logits_.get(), batch.m(), batch.vocab, batch.stride,
                                     logprobs_.get(), nullptr),
                 "variant");
    return Read(batch).logprobs;
  }
  static constexpr int64_t kGiven = 6;

 private:
  DeviceBuffer<float> logits_;
  DeviceBuffer<SamplingParams> params_;
  DeviceBuffer<uint64_t> index_;
  DeviceBuffer<TokenId> tokens_;
  DeviceBuffer<float> logprobs_;
  DeviceBuffer<TokenId> given_;
  DeviceBuffer<float> given_logprobs_;
};

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

enum class Shape { kNormal, kWide, kPeaked, kTies, kEqual, kFewFinite, kOneFar, kCount };

std::vector<float> RandomRow(Prng& random, int64_t vocab, Shape shape) {
  std::vector<float> row(static_cast<size_t>(vocab));
  // Cheap, nearly normal: 129,280 logarithms a row would be most of the test's time.
  for (float& z : row)
    z = (random.Unit() + random.Unit() + random.Unit() + random.Unit() - 2) * 1.7f;
  const auto place = [&] { return random.Below(static_cast<uint64_t>(vocab)); };
  switch (shape) {
    case Shape::kWide:
      for (float& z : row) z *= 4;
      break;
    case Shape::kPeaked:
      for (int i = 0; i < 30; ++i) row[place()] = 6.0f + 7.0f * random.Unit();
      break;
    case Shape::kTies:
      for (float& z : row) z = std::round(z * 2) / 2;
      for (int i = 0; i < 100; ++i) row[place()] = i % 2 ? -0.0f : 0.0f;
      break;
    case Shape::kEqual:
      std::fill(row.begin(), row.end(), -3.25f);
      break;
    case Shape::kFewFinite:
      for (float& z : row) z = random.Below(50) == 0 ? z : -kInfinity;
      row[place()] = 1.0f;
      break;
    case Shape::kOneFar:
      row[place()] = 60.0f;
      break;
    default:
      break;
  }
  return row;
}

std::vector<SamplingParams> Mixture() {
  return {{.temperature = 1.0f},
          {.temperature = 1.0f, .top_k = 50, .top_p = 0.95f},
          {.temperature = 0.7f, .top_p = 0.9f},
          {.temperature = 1.3f, .top_k = 1},
          {.temperature = 0.3f, .top_k = 20},
          {.temperature = 2.5f, .top_k = 400, .top_p = 0.5f},
          {.temperature = 1.0f, .top_k = 3000},
          {.temperature = 1.0f, .top_k = 60000, .top_p = 0.99f},
          {.temperature = 1.0f, .top_p = 0.999f},
          {.temperature = 0.05f, .top_p = 0.3f},
          {.temperature = 50.0f, .top_p = 0.8f},
          {.temperature = 1.0f, .top_k = 100, .top_p = 1e-9f},
          {.temperature = 0.9f, .top_p = 0.02f}};
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

// One row with every parameter set of the mixture, at several places of batches of every size.
// Returns how many results were compared and how many differ from the row's alone.
std::pair<int64_t, int64_t> CompareAtPlaces(bool batch_dependent) {
  Runner runner(512, 6004);
  const CompetingKernel competing;
  constexpr int64_t kVocab = 6001;
  Prng random(5);
  int64_t compared = 0, different = 0;
  for (const Shape shape : {Shape::kNormal, Shape::kTies, Shape::kPeaked}) {
    const std::vector<float> mine = RandomRow(random, kVocab, shape);
    Batch single;
    single.vocab = kVocab;
    single.stride = 6004;
    for (const SamplingParams& params : Mixture()) single.Add(mine, params, 9);
    single.Add(mine, {}, 9);
    // Alone: each in a batch of its own, on another stride.
    Drawn alone;
    for (int64_t i = 0; i < single.m(); ++i) {
      Batch one;
      one.vocab = kVocab;
      one.stride = kVocab;
      one.Add(mine, single.params[static_cast<size_t>(i)], 9);
      const Drawn drawn = runner.Draw(one);
      alone.tokens.push_back(drawn.tokens[0]);
      alone.logprobs.push_back(drawn.logprobs[0]);
    }
    for (const int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 512}) {
      Batch batch;
      batch.vocab = kVocab;
      batch.stride = 6004;
      std::vector<float> other = RandomRow(random, kVocab, Shape::kWide);
      const SamplingParams others{.temperature = 0.8f, .top_p = 0.9f};
      std::vector<int64_t> places;
      for (int64_t i = 0; i < m; ++i) {
        if (i == m - 1 || random.Below(3) == 0) {
          batch.Add(mine, single.params[places.size() % single.params.size()], 9);
          places.push_back(i);
          continue;
        }
        other[random.Below(kVocab)] = i % 3 == 0 ? std::nanf("") : i % 3 == 1 ? kInfinity : 3e38f;
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

TEST_F(SamplingTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  const auto [compared, different] = CompareAtPlaces(false);
  EXPECT_EQ(different, 0);
  std::printf("%ld results compared\n", compared);
}

TEST_F(SamplingTest, ABatchDependentSumWouldBeFound) {
  EXPECT_GT(CompareAtPlaces(true).second, 50);
}

// A batch in one call, against the same rows in calls of `chunk` rows that begin `shift` rows
// further on: every row at many places. A result is a function of its row's 129,280 logits.
TEST_F(SamplingTest, ChunksAndPlacesDoNotReachTheBits) {
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

TEST_F(SamplingTest, LaunchesBesideACompetingKernelAgree) {
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

TEST_F(SamplingTest, LogitsOfTheKernelInFrontAreWaitedFor) {
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
