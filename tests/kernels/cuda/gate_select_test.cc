// Goal: the GPU's expert choice is the reference's wherever rounding cannot decide, has the CPU
// kernels' bits, and is a function of its own row.

#include "kernels/cuda/gate_select/gate_select.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/gate.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/reference/gate.h"
#include "tests/kernels/cuda/batch_dependent_choice.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/launch_comparison.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

struct Choices {
  std::vector<uint32_t> experts;  // [m, top_k]
  std::vector<float> weights;
};

enum class Variant { kReal, kBatchDependent };

// Buffers for batches of up to 4,096 rows, allocated once: freeing device memory waits for all
// kernels, a competing one too.
class GateRunner {
 public:
  Choices Select(GateConfig config, const std::vector<float>& logits,
                 const std::vector<float>& bias, Variant variant = Variant::kReal) {
    logits_.Upload(logits);
    bias_.Upload(bias);
    experts_.Poison();
    weights_.Poison();
    if (variant == Variant::kBatchDependent) config.norm_topk_prob = false;
    GateSelectParams params;
    params.m = static_cast<int64_t>(logits.size()) / config.n_routed_experts;
    params.config = config;
    params.logits = logits_.get();
    params.bias = bias.empty() ? nullptr : bias_.get();
    params.experts = experts_.get();
    params.weights = weights_.get();
    const absl::Status status = LaunchGateSelect(params, nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
    if (variant == Variant::kBatchDependent) {
      ExpectCudaOk(
          LaunchNormaliseByPlace(weights_.get(), params.m, config.num_experts_per_tok, nullptr),
          "variant");
    }
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "GateSelect");
    const auto slots = static_cast<size_t>(params.m * config.num_experts_per_tok);
    Choices choices;
    const std::vector<ExpertId> ids = experts_.Download();
    for (size_t i = 0; i < slots; ++i) choices.experts.push_back(ids[i].value());
    choices.weights = weights_.Download();
    uint32_t beyond = 0;
    std::memcpy(&beyond, &choices.weights[slots], sizeof(beyond));
    EXPECT_EQ(beyond, 0xcdcdcdcdu) << "written beyond the last row";
    choices.weights.resize(slots);
    return choices;
  }

 private:
  static constexpr size_t kRows = 4096;
  DeviceBuffer<float> logits_{kRows * kGateMaxExperts};
  DeviceBuffer<float> bias_{kGateMaxExperts};
  DeviceBuffer<ExpertId> experts_{kRows * kGateMaxExpertsPerToken + 1};
  DeviceBuffer<float> weights_{kRows * kGateMaxExpertsPerToken + 1};
};

// What CpuBackend::GateSelect does with a row.
void SelectOnCpu(const GateConfig& config, const float* logits, const float* bias,
                 ExpertId* experts, float* weights) {
  const cpu::KernelTable& kernels = cpu::KernelsFor(cpu::BestTarget());
  std::array<float, cpu::kMaxExperts> scores;
  const int64_t count = config.n_routed_experts;
  if (config.scoring_func == ScoringFunc::kSigmoid) {
    kernels.sigmoid(logits, count, scores.data());
  } else {
    const float sum =
        kernels.sum_exp(logits, count, kernels.max(logits, count), 1.0f, scores.data());
    for (int64_t e = 0; e < count; ++e) scores[static_cast<size_t>(e)] /= sum;
  }
  cpu::SelectExperts(config, scores.data(), bias, experts, weights);
}

// Whether rounding could decide a row: two different values that decide the choice lie within 1e-6
// of each other (relative to the larger), in double precision.
bool IsClear(const GateConfig& config, const float* logits, const float* bias) {
  const auto count = static_cast<size_t>(config.n_routed_experts);
  std::vector<double> choice(count);
  double sum = 0;
  const double maximum = *std::max_element(logits, logits + count);
  for (size_t e = 0; e < count; ++e) {
    choice[e] = config.scoring_func == ScoringFunc::kSigmoid
                    ? 1 / (1 + std::exp(-static_cast<double>(logits[e])))
                    : std::exp(logits[e] - maximum);
    sum += choice[e];
  }
  for (size_t e = 0; e < count; ++e) {
    if (config.scoring_func == ScoringFunc::kSoftmax) choice[e] /= sum;
    if (bias != nullptr) choice[e] += bias[e];
  }
  const auto gap_is_clear = [](std::vector<double> values, size_t kept) {
    if (kept >= values.size()) return true;
    std::sort(values.begin(), values.end(), std::greater<>());
    const double gap = values[kept - 1] - values[kept];
    return gap == 0 || gap > 1e-6 * std::max(1e-3, std::fabs(values[kept - 1]));
  };
  const auto groups = static_cast<size_t>(config.n_group);
  if (groups > 1 && config.topk_method != TopkMethod::kGreedy) {
    const size_t size = count / groups;
    std::vector<double> scores(groups), best(groups);
    for (size_t g = 0; g < groups; ++g) {
      std::vector<double> members(choice.begin() + static_cast<int64_t>(g * size),
                                  choice.begin() + static_cast<int64_t>((g + 1) * size));
      std::sort(members.begin(), members.end(), std::greater<>());
      scores[g] = best[g] = members[0];
      if (config.topk_method == TopkMethod::kNoauxTc && size > 1) scores[g] += members[1];
    }
    const auto kept = static_cast<size_t>(config.topk_group);
    if (!gap_is_clear(scores, kept)) return false;
    // Equal sums of different members are equal in exact arithmetic only.
    for (size_t g = 0; g < groups; ++g) {
      for (size_t h = 0; h < g; ++h) {
        if (scores[g] == scores[h] && best[g] != best[h]) return false;
      }
    }
    std::vector<double> sorted = scores;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    size_t left = kept;
    std::vector<bool> keep(groups);
    for (size_t g = 0; g < groups; ++g) keep[g] = scores[g] > sorted[kept - 1];
    left -= static_cast<size_t>(std::count(keep.begin(), keep.end(), true));
    for (size_t g = 0; g < groups && left > 0; ++g) {
      if (scores[g] == sorted[kept - 1]) {
        keep[g] = true;
        --left;
      }
    }
    for (size_t e = 0; e < count; ++e) {
      if (!keep[e / size]) choice[e] = -std::numeric_limits<double>::infinity();
    }
  }
  return gap_is_clear(choice, static_cast<size_t>(config.num_experts_per_tok));
}

GateConfig DeepSeekV3() {
  return {.n_routed_experts = 256,
          .num_experts_per_tok = 8,
          .n_group = 8,
          .topk_group = 4,
          .routed_scaling_factor = 2.5f};
}

std::vector<GateConfig> Configs() {
  std::vector<GateConfig> configs;
  struct Shape {
    int32_t experts, top_k, groups, kept;
  };
  // The published models', then odd ones: groups that are no whole lanes, one expert a group, more
  // than 32 groups, all chosen.
  for (const Shape s :
       {Shape{256, 8, 8, 4}, Shape{160, 6, 8, 3}, Shape{64, 6, 1, 1}, Shape{384, 8, 1, 1},
        Shape{8, 2, 4, 2}, Shape{16, 4, 4, 2}, Shape{512, 16, 16, 4}, Shape{72, 4, 8, 3},
        Shape{40, 3, 40, 5}, Shape{320, 8, 64, 9}, Shape{8, 8, 1, 1}, Shape{9, 5, 3, 2},
        Shape{33, 16, 1, 1}, Shape{1, 1, 1, 1}, Shape{256, 8, 256, 8}, Shape{256, 12, 2, 1}}) {
    for (const ScoringFunc scoring : {ScoringFunc::kSigmoid, ScoringFunc::kSoftmax}) {
      for (const TopkMethod method :
           {TopkMethod::kGreedy, TopkMethod::kGroupLimitedGreedy, TopkMethod::kNoauxTc}) {
        GateConfig config{.n_routed_experts = s.experts,
                          .num_experts_per_tok = s.top_k,
                          .n_group = s.groups,
                          .topk_group = s.kept,
                          .scoring_func = scoring,
                          .topk_method = method};
        config.norm_topk_prob = configs.size() % 2 == 0;
        config.routed_scaling_factor = configs.size() % 3 == 0 ? 1.0f : 2.827f;
        configs.push_back(config);
      }
    }
  }
  return configs;
}

std::string NameOf(const GateConfig& c) {
  return absl::StrCat(c.n_routed_experts, " experts, top ", c.num_experts_per_tok, ", ", c.n_group,
                      " groups, ", c.topk_group, " kept, method ", static_cast<int>(c.topk_method),
                      ", scoring ", static_cast<int>(c.scoring_func));
}

class GateSelectTest : public GpuTest {};

TEST_F(GateSelectTest, ChoosesAsTheReferenceAndHasTheCpuKernelsBits) {
  GateRunner runner;
  int64_t rows = 0, unclear = 0;
  double largest_error[2] = {0, 0};  // softmax, sigmoid
  for (const GateConfig& config : Configs()) {
    const auto experts = static_cast<size_t>(config.n_routed_experts);
    const auto top_k = static_cast<size_t>(config.num_experts_per_tok);
    for (const bool ties : {false, true}) {
      for (const bool biased : {false, true}) {
        constexpr size_t kRows = 77;
        Prng random(1 + static_cast<uint64_t>(rows));
        std::vector<float> logits = RandomFloats(random, kRows * experts, 2.0f);
        std::vector<float> bias = RandomFloats(random, biased ? experts : 0, 0.1f);
        if (ties) {
          for (float& z : logits) z = std::round(z * 2) / 2;
          for (float& b : bias) b = std::round(b * 4) / 4;
        }
        const Choices found = runner.Select(config, logits, bias);
        for (size_t row = 0; row < kRows; ++row) {
          const float* const row_bias = biased ? bias.data() : nullptr;
          std::vector<ExpertId> cpu_experts(top_k), expected_experts(top_k);
          std::vector<float> cpu_weights(top_k), expected(top_k);
          SelectOnCpu(config, &logits[row * experts], row_bias, cpu_experts.data(),
                      cpu_weights.data());
          for (size_t j = 0; j < top_k; ++j) {
            ASSERT_EQ(found.experts[row * top_k + j], cpu_experts[j].value())
                << NameOf(config) << ", row " << row << ", slot " << j;
            ASSERT_EQ(HashOf(std::vector<float>{found.weights[row * top_k + j]}),
                      HashOf(std::vector<float>{cpu_weights[j]}))
                << NameOf(config) << ", row " << row << ", slot " << j << ": "
                << found.weights[row * top_k + j] << " is not " << cpu_weights[j];
          }
          ++rows;
          if (!IsClear(config, &logits[row * experts], row_bias)) {
            ++unclear;
            continue;
          }
          reference::GateSelectRow(config, {&logits[row * experts], experts}, bias,
                                   absl::MakeSpan(expected_experts), absl::MakeSpan(expected));
          for (size_t j = 0; j < top_k; ++j) {
            ASSERT_EQ(found.experts[row * top_k + j], expected_experts[j].value())
                << NameOf(config) << ", row " << row << ", slot " << j;
            double& largest = largest_error[static_cast<int>(config.scoring_func)];
            const float weight = found.weights[row * top_k + j];
            largest = std::max(largest,
                               std::fabs(static_cast<double>(weight) - expected[j]) / expected[j]);
          }
        }
      }
    }
  }
  std::printf("%ld rows, %ld too close to call, weights within %.2g (sigmoid), %.2g (softmax)\n",
              rows, unclear, largest_error[1], largest_error[0]);
  EXPECT_LT(unclear, rows / 100);
  EXPECT_LT(largest_error[1], 1e-6);
  // The reference adds up to 512 terms one after the other.
  EXPECT_LT(largest_error[0], 1e-5);
}

TEST_F(GateSelectTest, PoisonStaysInRangeAndInItsRow) {
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  GateRunner runner;
  for (const GateConfig& config : Configs()) {
    const auto experts = static_cast<size_t>(config.n_routed_experts);
    const auto top_k = static_cast<size_t>(config.num_experts_per_tok);
    constexpr size_t kRows = 24;
    Prng random(3);
    std::vector<float> logits = RandomFloats(random, kRows * experts, 2.0f);
    const std::vector<float> bias = RandomFloats(random, experts, 0.1f);
    for (size_t i = 0; i < logits.size(); ++i) {
      const size_t row = i / experts;
      const bool here = row % 2 == 0 || random.Below(3) == 0;
      if (row % 6 == 0) continue;
      if (here) logits[i] = row % 6 < 3 ? nan : row % 6 < 5 ? infinity : -infinity;
    }
    const Choices found = runner.Select(config, logits, bias);
    for (size_t row = 0; row < kRows; ++row) {
      std::vector<ExpertId> expected_experts(top_k);
      std::vector<float> expected(top_k);
      SelectOnCpu(config, &logits[row * experts], bias.data(), expected_experts.data(),
                  expected.data());
      for (size_t j = 0; j < top_k; ++j) {
        const uint32_t id = found.experts[row * top_k + j];
        ASSERT_LT(id, experts) << NameOf(config);
        if (j > 0) {
          ASSERT_LT(found.experts[row * top_k + j - 1], id) << NameOf(config);
        }
        ASSERT_EQ(id, expected_experts[j].value()) << NameOf(config) << ", row " << row;
        const float weight = found.weights[row * top_k + j];
        ASSERT_TRUE(weight == expected[j] || (weight != weight && expected[j] != expected[j]))
            << NameOf(config) << ", row " << row << ": " << weight << ", " << expected[j];
      }
    }
  }
}

// Puts one row at several places of batches of every size; returns how many values were compared
// and how many of them differ from the row's alone.
std::pair<int64_t, int64_t> CompareAtPlaces(GateRunner& runner, const GateConfig& config,
                                            uint64_t seed, Variant variant) {
  const auto experts = static_cast<size_t>(config.n_routed_experts);
  const auto top_k = static_cast<size_t>(config.num_experts_per_tok);
  Prng random(seed);
  const std::vector<float> mine = RandomFloats(random, experts, 2.0f);
  const std::vector<float> bias = RandomFloats(random, experts, 0.1f);
  const Choices alone = runner.Select(config, mine, bias, variant);
  int64_t compared = 0, different = 0;
  for (const int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 512, 529, 4096}) {
    std::vector<float> logits = RandomFloats(random, static_cast<size_t>(m) * experts, 3.0f);
    for (size_t i = 0; i < logits.size(); i += 1 + random.Below(50)) {
      logits[i] = i % 3 == 0   ? std::nanf("")
                  : i % 3 == 1 ? std::numeric_limits<float>::infinity()
                               : 3e38f;
    }
    std::vector<int64_t> places;
    for (int64_t p = 0; p<m; p += m> 8 ? 1 + static_cast<int64_t>(random.Below(5)) : 1)
      places.push_back(p);
    for (const int64_t p : places)
      std::copy(mine.begin(), mine.end(), logits.begin() + p * config.n_routed_experts);
    const Choices found = runner.Select(config, logits, bias, variant);
    for (const int64_t p : places) {
      for (size_t j = 0; j < top_k; ++j) {
        const size_t at = static_cast<size_t>(p) * top_k + j;
        different += found.experts[at] != alone.experts[j] ||
                     HashOf(std::vector<float>{found.weights[at]}) !=
                         HashOf(std::vector<float>{alone.weights[j]});
        compared += 2;
      }
    }
  }
  return {compared, different};
}

TEST_F(GateSelectTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  GateRunner runner;
  std::vector<GateConfig> configs = {DeepSeekV3()};
  for (size_t i = 0; i < Configs().size(); i += 5) configs.push_back(Configs()[i]);
  // A kernel's first launch loads it, which waits for all others.
  for (const GateConfig& config : configs) {
    for (const size_t m : {1, 529}) {
      runner.Select(config, std::vector<float>(m * static_cast<size_t>(config.n_routed_experts)),
                    {});
    }
  }
  const CompetingKernel competing;
  int64_t compared = 0;
  for (const GateConfig& config : configs) {
    const auto [values, different] = CompareAtPlaces(runner, config, 5, Variant::kReal);
    EXPECT_EQ(different, 0) << NameOf(config);
    compared += values;
  }
  std::printf("%ld values compared\n", compared);
  EXPECT_TRUE(competing.Runs());
}

// Many rows in one call, against the same rows in calls of `chunk` rows that begin `shift` rows
// further on. A row's place in its call then differs, and so does what stands around it.
TEST_F(GateSelectTest, ChunksAndPlacesDoNotReachTheBits) {
  constexpr int64_t kRows = 1 << 18, kMostShift = 1367, kExperts = 256;
  std::vector<float> logits(static_cast<size_t>((kRows + kMostShift) * kExperts));
  Prng random(21);
  for (float& z : logits) z = 8.0f * random.Unit() - 4.0f;
  for (size_t i = 0; i < logits.size(); i += 1 + random.Below(50'000)) {
    logits[i] = i % 3 == 0   ? std::nanf("")
                : i % 3 == 1 ? std::numeric_limits<float>::infinity()
                             : 3e38f;
  }
  std::copy_n(logits.begin(), kMostShift * kExperts, logits.begin() + kRows * kExperts);
  const DeviceBuffer<float> rows(logits);
  const DeviceBuffer<float> bias(RandomFloats(random, kExperts, 0.1f));
  GateConfig softmax = DeepSeekV3();
  softmax.scoring_func = ScoringFunc::kSoftmax;
  softmax.topk_method = TopkMethod::kGroupLimitedGreedy;
  GateConfig small_groups = DeepSeekV3();
  small_groups.n_group = 64;
  small_groups.topk_group = 9;
  DeviceBuffer<ExpertId> experts(static_cast<size_t>(kRows * 8));
  DeviceBuffer<float> weights(static_cast<size_t>(kRows * 8));
  const auto words = [](const auto& values) {
    std::vector<uint32_t> bits(values.size());
    std::memcpy(bits.data(), values.data(), bits.size() * sizeof(uint32_t));
    return bits;
  };
  int64_t compared = 0;
  for (const GateConfig& config : {DeepSeekV3(), softmax, small_groups}) {
    // Rows [0, m) of the buffer turned by `shift` rows, in calls of `chunk` rows.
    const auto select = [&](int64_t m, int64_t chunk, int64_t shift) {
      experts.Poison();
      weights.Poison();
      GateSelectParams params;
      params.config = config;
      params.bias = bias.get();
      for (int64_t row = 0; row < m; row += chunk) {
        params.m = std::min(chunk, m - row);
        params.logits = rows.get() + (shift + row) * kExperts;
        params.experts = experts.get() + row * 8;
        params.weights = weights.get() + row * 8;
        const absl::Status status = LaunchGateSelect(params, nullptr);
        EXPECT_TRUE(status.ok()) << status.ToString();
        if (!status.ok()) break;
      }
      return std::make_pair(words(experts.Download()), words(weights.Download()));
    };
    const auto [all_experts, all_weights] = select(kRows, kRows, 0);
    const CompetingKernel competing;
    for (const int64_t chunk : {1, 16, 63, 512}) {
      const int64_t m = chunk == 1 ? 1 << 14 : kRows - kMostShift;
      for (const int64_t shift : {int64_t{0}, int64_t{1}, kMostShift}) {
        const auto [found_experts, found_weights] = select(m, chunk, shift);
        int64_t different = 0;
        for (int64_t i = 0; i < m * 8; ++i) {
          const auto at = static_cast<size_t>(i), as = static_cast<size_t>(i + shift * 8);
          different += found_experts[at] != all_experts[as] || found_weights[at] != all_weights[as];
        }
        EXPECT_EQ(different, 0) << NameOf(config) << ", calls of " << chunk << " rows, " << shift
                                << " rows on";
        compared += 16 * m;
      }
    }
    EXPECT_TRUE(competing.Runs());
  }
  std::printf("%ld values compared\n", compared);
  EXPECT_GE(compared, 100'000'000);
}

TEST_F(GateSelectTest, ABatchDependentSumWouldBeFound) {
  GateRunner runner;
  int64_t different = 0;
  for (uint64_t seed = 5; seed < 10; ++seed)
    different += CompareAtPlaces(runner, DeepSeekV3(), seed, Variant::kBatchDependent).second;
  std::printf("%ld values differ\n", different);
  EXPECT_GT(different, 1000);
}

TEST_F(GateSelectTest, LaunchesBesideACompetingKernelAgree) {
  // A warp a group, and a warp a token.
  for (const int64_t m : {130, 600}) {
    SCOPED_TRACE(m);
    Prng random(8);
    const DeviceBuffer<float> logits(RandomFloats(random, static_cast<size_t>(m) * 256, 2.0f));
    const DeviceBuffer<float> bias(RandomFloats(random, 256, 0.1f));
    const auto chosen = static_cast<size_t>(m) * 8;
    const DeviceBuffer<ExpertId> experts(chosen), other_experts(chosen);
    const DeviceBuffer<float> weights(chosen), other_weights(chosen);
    GateSelectParams params;
    params.m = m;
    params.config = DeepSeekV3();
    params.logits = logits.get();
    params.bias = bias.get();
    ExpectEqualLaunches({{{{experts.get(), 4 * chosen}, {weights.get(), 4 * chosen}},
                          {{other_experts.get(), 4 * chosen}, {other_weights.get(), 4 * chosen}}}},
                        [&](int set, cudaStream_t stream) {
                          params.experts = set == 0 ? experts.get() : other_experts.get();
                          params.weights = set == 0 ? weights.get() : other_weights.get();
                          return LaunchGateSelect(params, stream);
                        });
  }
}

TEST_F(GateSelectTest, LogitsOfTheKernelInFrontAreWaitedFor) {
  Prng random(9);
  for (const int64_t m : {3, 130, 1200}) {
    const DeviceBuffer<float> logits(RandomFloats(random, static_cast<size_t>(m * 256), 2.0f));
    const DeviceBuffer<float> bias(RandomFloats(random, 256, 0.1f));
    DeviceBuffer<ExpertId> experts(static_cast<size_t>(m * 8));
    DeviceBuffer<float> weights(static_cast<size_t>(m * 8));
    GateSelectParams params;
    params.m = m;
    params.config = DeepSeekV3();
    params.logits = logits.get();
    params.bias = bias.get();
    params.experts = experts.get();
    params.weights = weights.get();
    ASSERT_STATUS_OK(LaunchGateSelect(params, nullptr));
    const uint64_t expected = HashOf(weights.Download()) ^ HashOf(experts.Download());
    experts.Poison();
    weights.Poison();
    const LateInput late(logits.get(), logits.count() * sizeof(float));
    ASSERT_STATUS_OK(LaunchGateSelect(params, nullptr));
    EXPECT_EQ(HashOf(weights.Download()) ^ HashOf(experts.Download()), expected) << "m = " << m;
  }
}

TEST_F(GateSelectTest, ConfigurationsThatItCannotTakeAreRefusedByName) {
  GateSelectParams good;
  EXPECT_TRUE(LaunchGateSelect(good, nullptr).ok()) << "no rows";
  const DeviceBuffer<float> some(256);
  good.m = 1;
  good.config = DeepSeekV3();
  good.logits = some.get();
  good.experts = reinterpret_cast<ExpertId*>(some.get());
  good.weights = some.get();
  struct Case {
    const char* name;
    void (*spoil)(GateSelectParams&);
  };
  for (const Case& c : {
           Case{"m is -1", [](GateSelectParams& p) { p.m = -1; }},
           Case{"n_routed_experts is 513",
                [](GateSelectParams& p) { p.config.n_routed_experts = 513; }},
           Case{"num_experts_per_tok is 17",
                [](GateSelectParams& p) { p.config.num_experts_per_tok = 17; }},
           Case{"num_experts_per_tok is 8",
                [](GateSelectParams& p) {
                  p.config.n_routed_experts = 4;
                  p.config.n_group = 1;
                  p.config.topk_group = 1;
                }},
           Case{"n_group is 7", [](GateSelectParams& p) { p.config.n_group = 7; }},
           Case{"topk_group is 9", [](GateSelectParams& p) { p.config.topk_group = 9; }},
           Case{"logits is null", [](GateSelectParams& p) { p.logits = nullptr; }},
           Case{"experts is null", [](GateSelectParams& p) { p.experts = nullptr; }},
           Case{"weights is null", [](GateSelectParams& p) { p.weights = nullptr; }},
       }) {
    GateSelectParams params = good;
    c.spoil(params);
    const absl::Status status = LaunchGateSelect(params, nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.name;
    EXPECT_NE(status.message().find(c.name), absl::string_view::npos) << status.message();
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
