// That a comparison of launches sees one wrong word of one launch, wherever it is.

#include "tests/kernels/cuda/launch_comparison.h"

#include <numeric>
#include <vector>

#include "tests/kernels/cuda/faulty_copy.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

constexpr size_t kWords = 100'003;
constexpr uint32_t kNever = UINT32_MAX;

class LaunchComparisonTest : public GpuTest {
 protected:
  // 200 launches behind the first one.
  LaunchComparison Compare(uint32_t faulty, size_t written = kWords) {
    std::vector<uint32_t> values(kWords);
    std::iota(values.begin(), values.end(), 7u);
    const DeviceBuffer<uint32_t> from(values), one(kWords), other(kWords);
    const DeviceBuffer<uint32_t> launches(std::vector<uint32_t>{0});
    return CompareLaunches(
        {{{{one.get(), 4 * kWords}}, {{other.get(), 4 * kWords}}}},
        [&](int set, cudaStream_t stream) {
          LaunchFaultyCopy(set == 0 ? one.get() : other.get(), from.get(),
                           set == 0 ? kWords : written, launches.get(), faulty, stream);
          return absl::OkStatus();
        },
        2);
  }
};

TEST_F(LaunchComparisonTest, EqualOnesHaveNoDifference) {
  const LaunchComparison found = Compare(kNever);
  EXPECT_EQ(found.launches, 200);
  EXPECT_EQ(found.words_compared, 200 * kWords);
  EXPECT_EQ(found.words_different, 0u);
}

TEST_F(LaunchComparisonTest, OneWordOfOneLaunchIsSeenWhereverItIs) {
  // Either launch of a pair, the first and the last of both replays.
  for (const uint32_t launch : {1, 2, 63, 100, 101, 138, 199, 200}) {
    const LaunchComparison found = Compare(launch);
    EXPECT_EQ(found.words_different, 1u) << "launch " << launch;
    EXPECT_EQ(found.first_pair, static_cast<int>((launch - 1) % 100 / 2)) << "launch " << launch;
  }
}

TEST_F(LaunchComparisonTest, AWordThatIsNotWrittenIsSeen) {
  const LaunchComparison found = Compare(kNever, kWords - 1);
  EXPECT_EQ(found.words_different, 100u);
  EXPECT_EQ(found.first_pair, 0);
}

TEST_F(LaunchComparisonTest, AFirstLaunchThatIsWrongIsUnlikeAllOthers) {
  EXPECT_EQ(Compare(0).words_different, 200u);
}

}  // namespace
}  // namespace moebius::kernels::cuda
