// The assumption under every GEMM of kernels/cuda: an output of a chain of m64nNk32 wgmma has the
// same bits whichever operand is A, wherever A lies and however wide N is. Only then may a kernel
// choose its tile by the number of rows (docs/exactness.md, the row rule).

#include "tests/kernels/cuda/wgmma_chain.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int64_t kTiles = 1530;  // 1530 * 65,536 outputs: 1.003e8
constexpr int64_t kTileBytes = 256 * 128;
constexpr int64_t kTileOutputs = 256 * 256;

class WgmmaChainTest : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    ASSERT_CUDA_OK(cudaMalloc(reinterpret_cast<void**>(&weights_), kTiles * kTileBytes));
    ASSERT_CUDA_OK(cudaMalloc(reinterpret_cast<void**>(&tokens_), kTiles * kTileBytes));
    ASSERT_CUDA_OK(
        cudaMalloc(reinterpret_cast<void**>(&first_), kTiles * kTileOutputs * sizeof(float)));
    ASSERT_CUDA_OK(cudaMalloc(reinterpret_cast<void**>(&mismatches_), sizeof(unsigned long long)));
    ASSERT_CUDA_OK(LaunchFillCodes(weights_, kTiles, 1, nullptr));
    ASSERT_CUDA_OK(LaunchFillCodes(tokens_, kTiles, 2, nullptr));
    ChainParams params = Params();
    params.out = first_;
    params.compare = nullptr;
    ASSERT_CUDA_OK(LaunchChain(ChainForm::kSharedA, 64, params, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
  }
  void TearDown() override {
    if (IsSkipped()) return;
    cudaFree(weights_);
    cudaFree(tokens_);
    cudaFree(first_);
    cudaFree(mismatches_);
    GpuTest::TearDown();
  }

  ChainParams Params() const {
    ChainParams params;
    params.tiles = kTiles;
    params.weights = weights_;
    params.tokens = tokens_;
    params.compare = first_;
    params.mismatches = mismatches_;
    return params;
  }

  unsigned long long Mismatches(ChainForm form, int n) {
    unsigned long long count = 0;
    ExpectCudaOk(cudaMemset(mismatches_, 0, sizeof count), "memset");
    ExpectCudaOk(LaunchChain(form, n, Params(), nullptr), "launch");
    ExpectCudaOk(cudaMemcpy(&count, mismatches_, sizeof count, cudaMemcpyDeviceToHost), "result");
    return count;
  }

  uint8_t* weights_ = nullptr;
  uint8_t* tokens_ = nullptr;
  float* first_ = nullptr;
  unsigned long long* mismatches_ = nullptr;
};

TEST_F(WgmmaChainTest, BitsDependOnNeitherRoleNorWidthNorPlaceOfOperands) {
  int ways = 0;
  for (const ChainForm form : {ChainForm::kSharedA, ChainForm::kRegistersA, ChainForm::kSwapped,
                               ChainForm::kSwappedRegistersA}) {
    unsigned long long worst = 0;
    for (int n = 8; n <= 256; n += 8) {
      const unsigned long long count = Mismatches(form, n);
      EXPECT_EQ(count, 0u) << NameOf(form) << ", n = " << n;
      worst = std::max(worst, count);
      ++ways;
    }
    std::printf("%-22s n = 8..256: at most %llu of %lld outputs differ\n", NameOf(form), worst,
                static_cast<long long>(kTiles * kTileOutputs));
  }
  EXPECT_EQ(ways, 128);
}

TEST_F(WgmmaChainTest, AnOrderThatDependsOnTheColumnIsSeen) {
  EXPECT_GT(Mismatches(ChainForm::kBatchDependent, 64), 0u);
}

TEST_F(WgmmaChainTest, ChainAgreesWithExactSums) {
  // Tiles of kinds 0 to 3 have no NaN. The tensor cores align the 32 products and the accumulator
  // of a step to the largest of them and keep 13 bits below it (what others have measured of
  // Hopper), so a step errs by less than 33 units of 2^-12 of the largest number it met.
  std::vector<uint8_t> weights(5 * kTileBytes), tokens(5 * kTileBytes);
  std::vector<float> sums(5 * kTileOutputs);
  ASSERT_CUDA_OK(cudaMemcpy(weights.data(), weights_, weights.size(), cudaMemcpyDeviceToHost));
  ASSERT_CUDA_OK(cudaMemcpy(tokens.data(), tokens_, tokens.size(), cudaMemcpyDeviceToHost));
  ASSERT_CUDA_OK(
      cudaMemcpy(sums.data(), first_, sums.size() * sizeof(float), cudaMemcpyDeviceToHost));
  for (int tile = 0; tile < 4; ++tile) {
    double worst = 0;
    for (int token = 0; token < 256; token += 5) {
      for (int row = 0; row < 256; row += 3) {
        double exact = 0, size = 0;
        for (int k = 0; k < 128; ++k) {
          const double product =
              static_cast<double>(ToFloat(E4m3{weights[tile * kTileBytes + row * 128 + k]})) *
              ToFloat(E4m3{tokens[tile * kTileBytes + token * 128 + k]});
          exact += product;
          size = std::max({size, std::abs(product), std::abs(exact)});
        }
        if (size == 0) continue;
        const double found = sums[tile * kTileOutputs + token * 256 + row];
        worst = std::max(worst, std::abs(found - exact) / size);
      }
    }
    std::printf("kind %d: largest error over the largest number met %.3g\n", tile, worst);
    EXPECT_LT(worst, 4 * 33 * 0x1p-12) << "kind " << tile;
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
