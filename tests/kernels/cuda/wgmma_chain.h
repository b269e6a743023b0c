#pragma once

// A kernel for wgmma_chain_test alone: the same 256 x 256 products, summed along K by one chain of
// wgmma, computed in every way a GEMM kernel could choose.

#include <cuda_runtime.h>

#include <cstdint>

namespace moebius::kernels::cuda {

enum class ChainType : int { kE4m3, kBf16 };

enum class ChainForm : int {
  kSharedA,            // weights are A, tokens B
  kRegistersA,         // the same, A from registers
  kSwapped,            // tokens are A, weights B
  kSwappedRegistersA,  // the same, A from registers
  kTransposedA,        // weights are A and MN-major in shared memory; BF16 alone
  kTransposedB,        // tokens are B and MN-major; BF16 alone
  kBatchDependent,     // a wrong form: the K steps are rotated by the column, to see the test fail
};
const char* NameOf(ChainForm form);

struct ChainParams {
  ChainType type = ChainType::kE4m3;
  int64_t tiles = 0;
  int k_bytes = 0;                   // of a row, a multiple of 128: 128 e4m3 or 64 BF16 a block
  const uint8_t* weights = nullptr;  // [tiles, 256, k_bytes]
  const uint8_t* tokens = nullptr;   // [tiles, 256, k_bytes]
  // out[tile][token][weight], the sum over all of K: wgmma of 32 bytes ascending, from zero.
  float* out = nullptr;            // written if `compare` is null
  const float* compare = nullptr;  // else compared with this, bit by bit
  unsigned long long* mismatches = nullptr;
};

// Every column of 256 is computed in blocks of `n` columns (the last block starts at 256 - n).
cudaError_t LaunchChain(ChainForm form, int n, const ChainParams& params, cudaStream_t stream);

// Fills [tiles, 256, k_bytes] with values drawn by the tile's kind, tile % 5: 0 all finite codes
// alike, 1 values near one, 2 large values in pairs (and small ones between), 3
// subnormals and zeros of both signs, 4 all codes, NaN and infinity too (in some rows). The pairs
// are x, -x among weights and y, y among tokens, so that their products cancel. BF16 has exponents
// so wide that products of any two codes are mostly infinite or zero: its kind 0 keeps products and
// sums finite, from 2^-122 to 2^126, its kind 3 multiplies subnormals by large numbers too, and its
// kind 4 leaves nothing out.
enum class ChainSide : int { kWeights, kTokens };
cudaError_t LaunchFillCodes(ChainType type, ChainSide side, uint8_t* codes, int64_t tiles,
                            int k_bytes, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
