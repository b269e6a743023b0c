#pragma once

// A kernel for wgmma_chain_test alone: the same 256 x 256 products over one 128-block of K,
// computed in every way a GEMM kernel could choose.

#include <cuda_runtime.h>

#include <cstdint>

namespace moebius::kernels::cuda {

enum class ChainForm : int {
  kSharedA,            // weights are A, tokens B
  kRegistersA,         // the same, A from registers
  kSwapped,            // tokens are A, weights B
  kSwappedRegistersA,  // the same, A from registers
  kBatchDependent,     // a wrong form: the K steps are rotated by the column, to see the test fail
};
const char* NameOf(ChainForm form);

struct ChainParams {
  int64_t tiles = 0;
  const uint8_t* weights = nullptr;  // [tiles, 256, 128] e4m3
  const uint8_t* tokens = nullptr;   // [tiles, 256, 128] e4m3
  // out[tile][token][weight], the sum over 128 products: 4 wgmma of k32 ascending, from zero.
  float* out = nullptr;            // written if `compare` is null
  const float* compare = nullptr;  // else compared with this, bit by bit
  unsigned long long* mismatches = nullptr;
};

// Every column of 256 is computed in blocks of `n` columns (the last block starts at 256 - n).
cudaError_t LaunchChain(ChainForm form, int n, const ChainParams& params, cudaStream_t stream);

// Fills `codes` with e4m3 codes drawn by `kind`: 0 all finite codes alike, 1 normal values, 2 large
// values in pairs of opposite sign, 3 subnormals and zeros of both signs, 4 all codes, NaN too.
cudaError_t LaunchFillCodes(uint8_t* codes, int64_t tiles, uint64_t seed, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
