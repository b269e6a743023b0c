// Kernels that start before the one in front of them has ended (device/dependent_launch.cuh): a
// chain in which each reads and overwrites what the last wrote gives the same bits as one that
// waits after every launch.

#include "kernels/cuda/combine/combine.h"
#include "kernels/cuda/residual/residual.h"
#include "kernels/cuda/rms_norm/rms_norm.h"
#include "kernels/cuda/row_digest/row_digest.h"
#include "kernels/cuda/swiglu/swiglu.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/row_rule.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int64_t kDim = 1024;
constexpr int kRounds = 100;

class DependentLaunchTest : public GpuTest {
 protected:
  // A round: norm, SwiGLU of its halves, combine of rows that were just written, residual, digest.
  // Returns the digests after kRounds of them. `wait`: after every launch.
  std::vector<uint64_t> Chain(int64_t m, bool wait) {
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
    for (int round = 0; round < kRounds; ++round) {
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

TEST_F(DependentLaunchTest, AChainThatOverlapsGivesTheBitsOfOneThatWaits) {
  for (const int64_t m : {1, 40, 700}) {
    const std::vector<uint64_t> waited = Chain(m, true);
    const CompetingKernel competing;
    for (int repeat = 0; repeat < 9; ++repeat) ASSERT_EQ(Chain(m, false), waited) << "m = " << m;
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
