#include <type_traits>
#include <utility>

#include "base/prng.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "tests/kernels/cuda/wgmma_chain.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int kSide = 256;
constexpr int kK = 128;

// [256][128] bytes into 128-byte swizzled rows.
__device__ void LoadSwizzled(uint8_t* to, const uint8_t* from) {
  for (int i = threadIdx.x; i < kSide * kK / 16; i += blockDim.x) {
    const int row = i / 8, chunk = i % 8;
    *reinterpret_cast<uint4*>(to + row * 128 + ((chunk ^ (row & 7)) * 16)) =
        reinterpret_cast<const uint4*>(from)[i];
  }
}

// The fragment of A that a thread holds for rows row0 .. row0 + 63 and bytes k0 .. k0 + 31.
__device__ void LoadFragment(uint32_t (&a)[4], const uint8_t* from, int row0, int k0) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + 16 * warp + lane / 4 + 8 * (i % 2);
    const int k = k0 + 4 * (lane % 4) + 16 * (i / 2);
    a[i] = *reinterpret_cast<const uint32_t*>(from + row * kK + k);
  }
}

template <int kN, bool kRegisters>
__global__ void __launch_bounds__(128) Chain(ChainForm form, ChainParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const weights = shared;
  uint8_t* const tokens = shared + kSide * kK;
  const uint8_t* const tile_weights = params.weights + blockIdx.x * int64_t{kSide * kK};
  const uint8_t* const tile_tokens = params.tokens + blockIdx.x * int64_t{kSide * kK};
  LoadSwizzled(weights, tile_weights);
  LoadSwizzled(tokens, tile_tokens);
  ProxyFence();
  __syncthreads();

  const bool swapped = form == ChainForm::kSwapped || form == ChainForm::kSwappedRegistersA;
  const uint32_t a_base = SharedAddress(swapped ? tokens : weights);
  const uint32_t b_base = SharedAddress(swapped ? weights : tokens);
  const uint8_t* const a_global = swapped ? tile_tokens : tile_weights;
  unsigned long long wrong = 0;
  for (int row0 = 0; row0 < kSide; row0 += 64) {
    for (int block = 0; block < (kSide + kN - 1) / kN; ++block) {
      const int column0 = min(block * kN, kSide - kN);
      float d[kN / 2];
      uint32_t fragment[4][4];
      const int rotation = form == ChainForm::kBatchDependent ? block : 0;
      if constexpr (kRegisters) {
#pragma unroll
        for (int step = 0; step < 4; ++step)
          LoadFragment(fragment[step], a_global, row0, 32 * step);
      }
      WgmmaFence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int k = (step + rotation) % 4;
        const uint64_t b = KMajorDescriptor(b_base + column0 * 128 + 32 * k);
        if constexpr (kRegisters) {
          WgmmaInstruction<E4m3Operands, kN>::Registers(d, fragment[step], b, step != 0);
        } else {
          const uint64_t a = KMajorDescriptor(a_base + row0 * 128 + 32 * k);
          WgmmaInstruction<E4m3Operands, kN>::Shared(d, a, b, step != 0);
        }
      }
      WgmmaCommit();
      WgmmaWait<0>();
      KeepRegisters(d);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        const int row = row0 + 16 * (threadIdx.x / 32) + (threadIdx.x % 32) / 4 + 8 * ((i % 4) / 2);
        const int column = column0 + 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2;
        const int64_t at = (int64_t{blockIdx.x} * kSide + (swapped ? row : column)) * kSide +
                           (swapped ? column : row);
        if (params.compare == nullptr) {
          params.out[at] = d[i];
        } else {
          wrong += __float_as_uint(params.compare[at]) != __float_as_uint(d[i]);
        }
      }
    }
  }
  if (wrong != 0) atomicAdd(params.mismatches, wrong);
}

template <int kN, bool kRegisters>
cudaError_t LaunchWidth(ChainForm form, const ChainParams& params, cudaStream_t stream) {
  constexpr int kBytes = 2 * kSide * kK;
  cudaError_t error = cudaFuncSetAttribute(Chain<kN, kRegisters>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  Chain<kN, kRegisters><<<static_cast<unsigned>(params.tiles), 128, kBytes, stream>>>(form, params);
  return cudaGetLastError();
}

template <int... kIndex>
cudaError_t Select(ChainForm form, int n, const ChainParams& params, cudaStream_t stream,
                   std::integer_sequence<int, kIndex...>) {
  cudaError_t result = cudaErrorInvalidValue;
  const bool registers = form == ChainForm::kRegistersA || form == ChainForm::kSwappedRegistersA;
  const auto launch = [&]<int kN>(std::integral_constant<int, kN>) {
    if (n != kN) return;
    result = registers ? LaunchWidth<kN, true>(form, params, stream)
                       : LaunchWidth<kN, false>(form, params, stream);
  };
  (launch(std::integral_constant<int, 8 * (kIndex + 1)>()), ...);
  return result;
}

__global__ void FillCodes(uint8_t* codes, uint64_t seed) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t row = at / kK, k = at % kK;
  const int kind = static_cast<int>((row / kSide) % 5);
  const uint64_t bits = CounterDraw(seed, 1, static_cast<uint64_t>(at));
  uint8_t code = static_cast<uint8_t>(bits);
  if (kind == 1) {  // exponents near 1
    code = static_cast<uint8_t>((code & 0x87) | ((5 + ((bits >> 8) & 3)) << 3));
  } else if (kind == 2) {  // x, -x side by side, large
    const uint64_t pair = CounterDraw(seed, 2, static_cast<uint64_t>(at / 2));
    code = static_cast<uint8_t>(((pair & 0x7f) | 0x40) ^ ((k & 1) << 7));
    if ((bits >> 8) % 16 == 0) code = static_cast<uint8_t>(bits & 0x8f);
  } else if (kind == 3) {
    code &= 0x87;  // exponent 0
  }
  const bool nan_row = kind == 4 && CounterDraw(seed, 3, static_cast<uint64_t>(row)) % 8 == 0;
  if (!nan_row && (code & 0x7f) == 0x7f) code ^= 1;
  codes[at] = code;
}

}  // namespace

const char* NameOf(ChainForm form) {
  switch (form) {
    case ChainForm::kSharedA:
      return "weights A, shared";
    case ChainForm::kRegistersA:
      return "weights A, registers";
    case ChainForm::kSwapped:
      return "tokens A, shared";
    case ChainForm::kSwappedRegistersA:
      return "tokens A, registers";
    case ChainForm::kBatchDependent:
      return "rotated K steps";
  }
  return "?";
}

cudaError_t LaunchChain(ChainForm form, int n, const ChainParams& params, cudaStream_t stream) {
  return Select(form, n, params, stream, std::make_integer_sequence<int, 32>());
}

cudaError_t LaunchFillCodes(uint8_t* codes, int64_t tiles, uint64_t seed, cudaStream_t stream) {
  FillCodes<<<static_cast<unsigned>(tiles * kSide * kK / 256), 256, 0, stream>>>(codes, seed);
  return cudaGetLastError();
}

}  // namespace moebius::kernels::cuda
