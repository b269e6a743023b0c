// Goal: the packed order is expert, token, slot, for every batch, and nothing else moves it.

#include "kernels/cuda/expert_groups/expert_groups.h"

#include <algorithm>
#include <numeric>

#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/launch_comparison.h"

namespace moebius::kernels::cuda {
namespace {

struct Groups {
  std::vector<int32_t> offsets, rows, packed;
  friend bool operator==(const Groups&, const Groups&) = default;
};

constexpr int32_t kUntouched = static_cast<int32_t>(0xcdcdcdcdu);

// Buffers allocated once: freeing device memory waits for all kernels, a competing one too.
class Runner {
 public:
  explicit Runner(const std::vector<uint32_t>& experts, int32_t top_k, int32_t num_experts)
      : experts_(experts),
        offsets_(static_cast<size_t>(num_experts) + 1),
        rows_(experts.size()),
        packed_(experts.size()) {
    params_.m = static_cast<int64_t>(experts.size()) / top_k;
    params_.top_k = top_k;
    params_.num_experts = num_experts;
    params_.experts = reinterpret_cast<const ExpertId*>(experts_.get());
    params_.expert_offsets = offsets_.get();
    params_.row_index = rows_.get();
    params_.packed_rows = packed_.get();
  }
  void Launch() {
    const absl::Status status = LaunchExpertGroups(params_, nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
  }
  const ExpertGroupsParams& params() const { return params_; }
  std::vector<OutputSpan> Outputs() const {
    return {{offsets_.get(), 4 * offsets_.count()},
            {rows_.get(), 4 * rows_.count()},
            {packed_.get(), 4 * packed_.count()}};
  }
  Groups Read() {
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "ExpertGroups");
    Groups groups{offsets_.Download(), rows_.Download(), packed_.Download()};
    offsets_.Poison();
    rows_.Poison();
    packed_.Poison();
    return groups;
  }

 private:
  DeviceBuffer<uint32_t> experts_;
  DeviceBuffer<int32_t> offsets_, rows_, packed_;
  ExpertGroupsParams params_;
};

Groups GroupOnGpu(const std::vector<uint32_t>& experts, int32_t top_k, int32_t num_experts) {
  Runner runner(experts, top_k, num_experts);
  runner.Launch();
  return runner.Read();
}

Groups Expected(const std::vector<uint32_t>& experts, int32_t top_k, int32_t num_experts) {
  Groups groups;
  groups.rows.assign(experts.size(), kUntouched);
  groups.packed.assign(experts.size(), kUntouched);
  int32_t at = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    groups.offsets.push_back(at);
    for (size_t i = 0; i < experts.size(); ++i) {
      if (experts[i] != static_cast<uint32_t>(e)) continue;
      groups.rows[static_cast<size_t>(at)] = static_cast<int32_t>(i) / top_k;
      groups.packed[i] = at++;
    }
  }
  groups.offsets.push_back(at);
  return groups;
}

// Distinct ascending experts a token, a few favoured.
std::vector<uint32_t> RandomChoice(Prng& random, int64_t m, int32_t top_k, int32_t num_experts) {
  std::vector<uint32_t> experts;
  std::vector<uint32_t> ids(static_cast<size_t>(num_experts));
  std::iota(ids.begin(), ids.end(), 0u);
  for (int64_t t = 0; t < m; ++t) {
    for (int32_t j = 0; j < top_k; ++j) {
      const uint64_t left = static_cast<uint64_t>(num_experts - j);
      const uint64_t pick = random.Below(2) == 0 ? random.Below(left) : random.Below(left / 4 + 1);
      std::swap(ids[static_cast<size_t>(j)], ids[static_cast<size_t>(j) + pick]);
    }
    std::vector<uint32_t> mine(ids.begin(), ids.begin() + top_k);
    std::sort(mine.begin(), mine.end());
    experts.insert(experts.end(), mine.begin(), mine.end());
  }
  return experts;
}

class ExpertGroupsTest : public GpuTest {};

TEST_F(ExpertGroupsTest, PairsAreInTheOrderOfExpertThenToken) {
  struct Case {
    int64_t m;
    int32_t top_k, num_experts;
  };
  Prng random(1);
  for (const Case c : {Case{1, 8, 256}, Case{1, 1, 1}, Case{7, 6, 160}, Case{128, 8, 256},
                       Case{129, 2, 8}, Case{255, 8, 384}, Case{256, 8, 256}, Case{257, 8, 256},
                       Case{511, 16, 512}, Case{4096, 8, 256}, Case{5001, 3, 64}}) {
    const std::vector<uint32_t> experts = RandomChoice(random, c.m, c.top_k, c.num_experts);
    EXPECT_EQ(GroupOnGpu(experts, c.top_k, c.num_experts),
              Expected(experts, c.top_k, c.num_experts))
        << c.m << " tokens, top " << c.top_k << " of " << c.num_experts;
  }
}

TEST_F(ExpertGroupsTest, AllTokensAtOneExpertAndStrangersWithoutARow) {
  const std::vector<uint32_t> same(3000, 5);
  EXPECT_EQ(GroupOnGpu(same, 1, 9), Expected(same, 1, 9));
  std::vector<uint32_t> strangers(800);
  for (size_t i = 0; i < strangers.size(); ++i)
    strangers[i] = i % 3 == 0 ? 0xffffffffu : i % 3 == 1 ? 16u : static_cast<uint32_t>(i % 16);
  EXPECT_EQ(GroupOnGpu(strangers, 8, 16), Expected(strangers, 8, 16));
}

TEST_F(ExpertGroupsTest, NoTokensGiveEmptyGroups) {
  EXPECT_EQ(GroupOnGpu({}, 8, 5).offsets, std::vector<int32_t>(6, 0));
}

TEST_F(ExpertGroupsTest, LaunchesBesideACompetingKernelAgree) {
  Prng random(2);
  const std::vector<uint32_t> experts = RandomChoice(random, 600, 8, 256);
  Runner runner(experts, 8, 256), other(experts, 8, 256);
  ExpectEqualLaunches({runner.Outputs(), other.Outputs()}, [&](int set, cudaStream_t stream) {
    return LaunchExpertGroups((set == 0 ? runner : other).params(), stream);
  });
  runner.Launch();
  EXPECT_EQ(runner.Read(), Expected(experts, 8, 256));
}

TEST_F(ExpertGroupsTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  const DeviceBuffer<int32_t> some(64);
  ExpertGroupsParams good;
  good.m = 2;
  good.top_k = 2;
  good.num_experts = 4;
  good.experts = reinterpret_cast<const ExpertId*>(some.get());
  good.expert_offsets = some.get();
  good.row_index = some.get();
  struct Case {
    const char* name;
    void (*spoil)(ExpertGroupsParams&);
  };
  for (const Case& c : {
           Case{"m is -1", [](ExpertGroupsParams& p) { p.m = -1; }},
           Case{"top_k is 0", [](ExpertGroupsParams& p) { p.top_k = 0; }},
           Case{"num_experts is 5000", [](ExpertGroupsParams& p) { p.num_experts = 5000; }},
           Case{"experts is null", [](ExpertGroupsParams& p) { p.experts = nullptr; }},
           Case{"expert_offsets is null",
                [](ExpertGroupsParams& p) { p.expert_offsets = nullptr; }},
           Case{"row_index is null", [](ExpertGroupsParams& p) { p.row_index = nullptr; }},
       }) {
    ExpertGroupsParams params = good;
    c.spoil(params);
    const absl::Status status = LaunchExpertGroups(params, nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.name;
    EXPECT_NE(status.message().find(c.name), absl::string_view::npos) << status.message();
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
