// The assumption under every GEMM of kernels/cuda: an output of a chain of wgmma (FP8 m64nNk32,
// BF16 m64nNk16) has the same bits whichever operand is A, wherever and in which order A lies and
// however wide N is. Only then may a kernel choose its tile by the number of rows
// (docs/exactness.md, the row rule).

#include "tests/kernels/cuda/wgmma_chain.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int64_t kTiles = 1530;  // 1530 * 65,536 outputs: 1.003e8
constexpr int64_t kTileOutputs = 256 * 256;

// Operands of `tiles` tiles and the sums of one form, with which the others are compared.
class Chains {
 public:
  Chains(ChainType type, int64_t tiles, int k_bytes) {
    params_.type = type;
    params_.tiles = tiles;
    params_.k_bytes = k_bytes;
    const int64_t bytes = tiles * 256 * k_bytes;
    Allocate(&weights_, bytes);
    Allocate(&tokens_, bytes);
    Allocate(&first_, tiles * kTileOutputs * 4);
    Allocate(&mismatches_, 8);
    ExpectCudaOk(LaunchFillCodes(type, ChainSide::kWeights, weights_, tiles, k_bytes, nullptr),
                 "weights");
    ExpectCudaOk(LaunchFillCodes(type, ChainSide::kTokens, tokens_, tiles, k_bytes, nullptr),
                 "tokens");
    params_.weights = weights_;
    params_.tokens = tokens_;
    params_.out = reinterpret_cast<float*>(first_);
    params_.mismatches = reinterpret_cast<unsigned long long*>(mismatches_);
    ExpectCudaOk(LaunchChain(ChainForm::kSharedA, 64, params_, nullptr), "first form");
    ExpectCudaOk(cudaDeviceSynchronize(), "first form");
    params_.compare = params_.out;
  }
  ~Chains() {
    for (void* pointer : {weights_, tokens_, first_, mismatches_}) cudaFree(pointer);
  }
  Chains(const Chains&) = delete;
  Chains& operator=(const Chains&) = delete;

  // Outputs of `form` that differ from the first form's in any bit.
  unsigned long long Mismatches(ChainForm form, int n) {
    unsigned long long count = 0;
    ExpectCudaOk(cudaMemset(mismatches_, 0, sizeof count), "memset");
    ExpectCudaOk(LaunchChain(form, n, params_, nullptr), "launch");
    ExpectCudaOk(cudaMemcpy(&count, mismatches_, sizeof count, cudaMemcpyDeviceToHost), "result");
    return count;
  }

  // Expects all of `forms` at n = first, first + step, .. 256 to agree.
  void ExpectOneArithmetic(std::initializer_list<ChainForm> forms, int step) {
    for (const ChainForm form : forms) {
      unsigned long long worst = 0;
      int widths = 0;
      for (int n = 8; n <= 256; n += step) {
        const unsigned long long count = Mismatches(form, n);
        EXPECT_EQ(count, 0u) << NameOf(form) << ", n = " << n;
        worst = std::max(worst, count);
        ++widths;
      }
      std::printf("%s, %5d bytes of K: %-22s %2d widths: at most %llu of %lld outputs differ\n",
                  params_.type == ChainType::kBf16 ? "BF16" : "FP8 ", params_.k_bytes, NameOf(form),
                  widths, worst, static_cast<long long>(params_.tiles * kTileOutputs));
    }
  }

  // Of the first five tiles, one of each kind.
  std::vector<uint8_t> Weights() const { return Download<uint8_t>(weights_, 5 * TileBytes()); }
  std::vector<uint8_t> Tokens() const { return Download<uint8_t>(tokens_, 5 * TileBytes()); }
  std::vector<float> Sums() const { return Download<float>(first_, 5 * kTileOutputs); }

 private:
  int64_t TileBytes() const { return int64_t{256} * params_.k_bytes; }
  static void Allocate(uint8_t** pointer, int64_t bytes) {
    ExpectCudaOk(cudaMalloc(reinterpret_cast<void**>(pointer), static_cast<size_t>(bytes)),
                 "cudaMalloc");
  }
  template <typename T>
  static std::vector<T> Download(const uint8_t* from, int64_t count) {
    std::vector<T> host(static_cast<size_t>(count));
    ExpectCudaOk(cudaMemcpy(host.data(), from, host.size() * sizeof(T), cudaMemcpyDeviceToHost),
                 "download");
    return host;
  }

  ChainParams params_;
  uint8_t* weights_ = nullptr;
  uint8_t* tokens_ = nullptr;
  uint8_t* first_ = nullptr;
  uint8_t* mismatches_ = nullptr;
};

class WgmmaChainTest : public GpuTest {};

constexpr std::initializer_list<ChainForm> kForms = {ChainForm::kSharedA, ChainForm::kRegistersA,
                                                     ChainForm::kSwapped,
                                                     ChainForm::kSwappedRegistersA};

TEST_F(WgmmaChainTest, BitsOfFp8DependOnNeitherRoleNorWidthNorPlaceOfOperands) {
  Chains chains(ChainType::kE4m3, kTiles, 128);
  chains.ExpectOneArithmetic(kForms, 8);
  EXPECT_GT(chains.Mismatches(ChainForm::kBatchDependent, 64), 0u)
      << "an order of K that depends on the column is not seen";
}

TEST_F(WgmmaChainTest, BitsOfBf16DependOnNeitherRoleNorWidthNorPlaceOfOperands) {
  Chains chains(ChainType::kBf16, kTiles, 2 * 512);
  chains.ExpectOneArithmetic(kForms, 8);
  EXPECT_GT(chains.Mismatches(ChainForm::kBatchDependent, 64), 0u)
      << "an order of K that depends on the column is not seen";
}

TEST_F(WgmmaChainTest, BitsOfALongBf16ChainDependOnNeitherRoleNorWidth) {
  Chains chains(ChainType::kBf16, kTiles / 10, 2 * 7168);
  chains.ExpectOneArithmetic(kForms, 24);
}

TEST_F(WgmmaChainTest, BitsOfBf16DependNotOnTheOrderOfTheOperandsInMemory) {
  Chains chains(ChainType::kBf16, kTiles / 10, 2 * 512);
  chains.ExpectOneArithmetic({ChainForm::kTransposedA, ChainForm::kTransposedB}, 8);
}

// The same at a size that a sanitizer gets through.
TEST_F(WgmmaChainTest, FiveTilesOfEveryFormAndWidthAreOneArithmetic) {
  Chains(ChainType::kE4m3, 5, 256).ExpectOneArithmetic(kForms, 8);
  Chains bf16(ChainType::kBf16, 5, 2 * 128);
  bf16.ExpectOneArithmetic(kForms, 8);
  bf16.ExpectOneArithmetic({ChainForm::kTransposedA, ChainForm::kTransposedB}, 8);
}

TEST_F(WgmmaChainTest, ChainsAgreeWithExactSums) {
  // Tiles of kinds 0 to 3 have no NaN. The tensor cores align the products of a step and the
  // accumulator to the largest of them and keep some bits below it, as others have measured of
  // Hopper: 13 for FP8, about those of float32 for BF16. A step of s products errs by less than s +
  // 1 units of the last of them.
  struct Case {
    ChainType type;
    int k_bytes, steps, products;
    double unit;
  };
  for (const Case& c : {Case{ChainType::kE4m3, 128, 4, 32, 0x1p-12},
                        Case{ChainType::kBf16, 2 * 512, 32, 16, 0x1p-23}}) {
    const Chains chains(c.type, 5, c.k_bytes);
    const std::vector<uint8_t> weights = chains.Weights(), tokens = chains.Tokens();
    const std::vector<float> sums = chains.Sums();
    const int cols = c.steps * c.products;
    const auto value = [&](const std::vector<uint8_t>& codes, int tile, int row, int k) {
      const size_t at =
          (static_cast<size_t>(tile) * 256 + static_cast<size_t>(row)) * static_cast<size_t>(cols) +
          static_cast<size_t>(k);
      if (c.type == ChainType::kE4m3) return static_cast<double>(ToFloat(E4m3{codes[at]}));
      return static_cast<double>(
          ToFloat(Bf16{static_cast<uint16_t>(codes[2 * at] | (codes[2 * at + 1] << 8))}));
    };
    for (int tile = 0; tile < 4; ++tile) {
      double worst = 0;
      int compared = 0;
      for (int token = 0; token < 256; token += 5) {
        for (int row = 0; row < 256; row += 3) {
          double exact = 0, size = 0;
          for (int k = 0; k < cols; ++k) {
            const double product = value(weights, tile, row, k) * value(tokens, tile, token, k);
            exact += product;
            size = std::max({size, std::abs(product), std::abs(exact)});
          }
          if (size < 0x1p-100 || size > 0x1p126) continue;  // float32 has no such sums
          const double found = sums[static_cast<size_t>(tile * kTileOutputs + token * 256 + row)];
          worst = std::max(worst, std::abs(found - exact) / size);
          ++compared;
        }
      }
      std::printf("%s, kind %d: largest error over the largest number met %.3g (%d sums)\n",
                  c.type == ChainType::kBf16 ? "BF16" : "FP8", tile, worst, compared);
      EXPECT_LT(worst, c.steps * (c.products + 1) * c.unit) << "kind " << tile;
      EXPECT_GT(compared, 0);
    }
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
