// Kernels that start before the one in front of them has ended (device/dependent_launch.cuh): a
// chain in which each reads and overwrites what the last wrote gives the same bits as one that
// waits after every launch. And kernels have the launch that they were given.

#include "kernels/cuda/combine/combine.h"
#include "kernels/cuda/residual/residual.h"
#include "kernels/cuda/rms_norm/rms_norm.h"
#include "kernels/cuda/row_digest/row_digest.h"
#include "kernels/cuda/swiglu/swiglu.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/launch_probe.h"
#include "tests/kernels/cuda/row_rule.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int64_t kDim = 1024;

class DependentLaunchTest : public GpuTest {
 protected:
  // A round: norm, SwiGLU of its halves, combine of rows that were just written, residual, digest.
  // Returns the digests after `rounds` of them. `wait`: after every launch.
  std::vector<uint64_t> Chain(int64_t m, int rounds, bool wait) {
    Prng random(1);
    const auto elements = static_cast<size_t>(m * kDim);
    const DeviceBuffer<Bf16> h(RandomBf16(random, elements)), normed(elements), halves(elements),
        routed(elements);
    const DeviceBuffer<float> weight(RandomFloats(random, kDim));
    std::vector<ExpertId> experts;
    std::vector<float> weights;
    std::vector<int32_t> index;
    for (int64_t i = 0; i < m; ++i) {
      for (int j = 0; j < 4; ++j) {
        experts.push_back(ExpertId(static_cast<uint32_t>(20 * j)));
        weights.push_back(0.25f * static_cast<float>(j + 1));
        index.push_back(static_cast<int32_t>((i * 7 + j * 3) % m));
      }
    }
    const DeviceBuffer<ExpertId> device_experts(experts);
    const DeviceBuffer<float> device_weights(weights);
    const DeviceBuffer<int32_t> device_index(index);
    const DeviceBuffer<uint64_t> digests(static_cast<size_t>(m));

    RmsNormParams norm;
    norm.m = m;
    norm.dim = norm.x_stride = norm.out_stride = kDim;
    norm.x = h.get();
    norm.weight = weight.get();
    norm.out = normed.get();
    SwiGluParams swiglu;
    swiglu.m = 2 * m;  // halves of rows: dense rows of kDim / 2
    swiglu.dim = kDim / 2;
    swiglu.in_stride = kDim / 2;
    swiglu.gate = normed.get();
    swiglu.up = normed.get();
    swiglu.out = halves.get();
    CombineParams combine;
    combine.m = m;
    combine.dim = kDim;
    combine.top_k = 4;
    combine.experts = device_experts.get();
    combine.weights = device_weights.get();
    combine.buffer = halves.get();
    combine.row_index = device_index.get();
    combine.out = routed.get();
    ResidualParams residual;
    residual.m = m;
    residual.dim = kDim;
    residual.h = h.get();
    residual.y = routed.get();
    residual.shared = normed.get();
    cudaStream_t stream;
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "uploads and poison");
    ExpectCudaOk(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    const auto expect_ok = [&](const absl::Status& status) {
      EXPECT_TRUE(status.ok()) << status.ToString();
      if (wait) ExpectCudaOk(cudaStreamSynchronize(stream), "wait");
    };
    for (int round = 0; round < rounds; ++round) {
      expect_ok(LaunchRmsNorm(norm, stream));
      expect_ok(LaunchSwiGlu(swiglu, stream));
      expect_ok(LaunchCombine(combine, stream));
      expect_ok(LaunchResidual(residual, stream));
    }
    RowDigestParams digest;
    digest.m = m;
    digest.dim = digest.hidden_stride = kDim;
    digest.hidden = h.get();
    digest.logprobs = device_weights.get();
    digest.digests = digests.get();
    expect_ok(LaunchRowDigest(digest, stream));
    ExpectCudaOk(cudaStreamSynchronize(stream), "chain");
    ExpectCudaOk(cudaStreamDestroy(stream), "stream");
    return digests.Download();
  }
};

TEST_F(DependentLaunchTest, AShortChainThatOverlapsGivesTheBitsOfOneThatWaits) {
  for (const int64_t m : {1, 3, 41}) EXPECT_EQ(Chain(m, 4, false), Chain(m, 4, true)) << m;
}

TEST_F(DependentLaunchTest, AKernelHasTheSharedMemoryAndClusterThatItWasLaunchedWith) {
  const DeviceBuffer<uint32_t> word(std::vector<uint32_t>{7});
  for (LaunchShape shape :
       {LaunchShape{dim3(5), dim3(1), 1, 4}, LaunchShape{dim3(2, 3), dim3(1), 1, 200'000},
        LaunchShape{dim3(4, 1, 3), dim3(2, 1, 3), 1, 48 << 10},
        LaunchShape{dim3(32), dim3(8), 1, 64}}) {
    for (const bool overlaps : {false, true}) {
      shape.overlaps = overlaps;
      const DeviceBuffer<LaunchRecord> record(1);
      ASSERT_STATUS_OK(LaunchProbe(shape, word.get(), record.get(), nullptr));
      const LaunchRecord found = record.Download()[0];
      EXPECT_EQ(found.shared_bytes, static_cast<uint32_t>(shape.shared_bytes));
      EXPECT_EQ(found.cluster[0], shape.cluster.x);
      EXPECT_EQ(found.cluster[1], shape.cluster.y);
      EXPECT_EQ(found.cluster[2], shape.cluster.z);
      EXPECT_EQ(found.grid[0], shape.grid.x);
      EXPECT_EQ(found.grid[1], shape.grid.y);
      EXPECT_EQ(found.grid[2], shape.grid.z);
      EXPECT_EQ(found.seen, 7u);
    }
  }
}

// By what the second of two reads without waiting: before the first has written it, or after.
TEST_F(DependentLaunchTest, LaunchesStartEarlyOnlyIfTheyMay) {
  const DeviceBuffer<uint32_t> from(std::vector<uint32_t>{8});
  DeviceBuffer<uint32_t> to(1);
  for (const bool overlaps : {false, true}) {
    to.Upload({9});
    const DeviceBuffer<LaunchRecord> record(1);
    LaunchSlowCopy(to.get(), from.get(), sizeof(uint32_t), nullptr);
    ASSERT_STATUS_OK(
        LaunchProbe({dim3(1), dim3(1), 1, 4, overlaps}, to.get(), record.get(), nullptr));
    EXPECT_EQ(record.Download()[0].seen, overlaps ? 9u : 8u);
  }
}

TEST_F(DependentLaunchTest, LaunchesThatOverlapBesideACompetingKernelGiveTheBitsOfThoseThatWait) {
  for (const int64_t m : {1, 40, 700}) {
    const std::vector<uint64_t> waited = Chain(m, 100, true);
    const CompetingKernel competing;
    for (int repeat = 0; repeat < 9; ++repeat)
      ASSERT_EQ(Chain(m, 100, false), waited) << "m = " << m;
    EXPECT_TRUE(competing.Runs());
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
