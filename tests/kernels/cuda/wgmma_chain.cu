#include "tests/kernels/cuda/wgmma_chain.h"

#include <type_traits>
#include <utility>

#include "base/prng.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/wgmma.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr int kSide = 256;
constexpr int kBlock = 128;  // bytes of K in shared memory at a time: four steps
constexpr int kStep = 32;

// `rows` x 128 bytes into 128-byte swizzled rows.
__device__ void LoadSwizzled(uint8_t* to, const uint8_t* from, int64_t stride, int rows) {
  for (int i = threadIdx.x; i < rows * 8; i += blockDim.x) {
    const int row = i / 8, chunk = i % 8;
    *reinterpret_cast<uint4*>(to + row * 128 + ((chunk ^ (row & 7)) * 16)) =
        *reinterpret_cast<const uint4*>(from + row * stride + chunk * 16);
  }
}

// The same of BF16, MN-major: groups of 64 rows, each 64 k x 64 rows, swizzled rows of one k.
__device__ void LoadTransposed(uint8_t* to, const uint8_t* from, int64_t stride, int rows) {
  for (int i = threadIdx.x; i < rows * 64; i += blockDim.x) {
    const int row = i / 64, k = i % 64, place = row % 64;
    *reinterpret_cast<uint16_t*>(to + row / 64 * 8192 + k * 128 +
                                 ((place / 8 ^ (k & 7)) * 16 + place % 8 * 2)) =
        *reinterpret_cast<const uint16_t*>(from + row * stride + 2 * k);
  }
}

// The fragment of A that a thread holds for a warpgroup's 64 rows and 32 bytes of K.
__device__ void LoadFragment(uint32_t (&a)[4], const uint8_t* from, int64_t stride, int k0) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i % 2);
    const int k = k0 + 4 * (lane % 4) + 16 * (i / 2);
    a[i] = *reinterpret_cast<const uint32_t*>(from + row * stride + k);
  }
}

enum class Operands { kShared, kRegistersA, kTransposedA, kTransposedB };

// A CTA computes 64 rows of A by n columns of B at a time.
template <typename Type, int kN, Operands kOperands>
__global__ void __launch_bounds__(128) Chain(ChainForm form, ChainParams params) {
  constexpr bool kTransposed =
      kOperands == Operands::kTransposedA || kOperands == Operands::kTransposedB;
  // An MN-major B of kN columns is stored in whole groups of 64.
  constexpr int kBRows = kOperands == Operands::kTransposedB ? (kN + 63) / 64 * 64 : kN;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const a_tile = shared;
  uint8_t* const b_tile = shared + 64 * kBlock;
  const int64_t stride = params.k_bytes;
  const uint8_t* const tile_weights = params.weights + blockIdx.x * (kSide * stride);
  const uint8_t* const tile_tokens = params.tokens + blockIdx.x * (kSide * stride);
  const bool swapped = form == ChainForm::kSwapped || form == ChainForm::kSwappedRegistersA;
  const uint8_t* const a_global = swapped ? tile_tokens : tile_weights;
  const uint8_t* const b_global = swapped ? tile_weights : tile_tokens;
  unsigned long long wrong = 0;
  for (int row0 = 0; row0 < kSide; row0 += 64) {
    for (int block = 0; block < (kSide + kN - 1) / kN; ++block) {
      const int column0 = min(block * kN, kSide - kN);
      const int rotation = form == ChainForm::kBatchDependent ? block : 0;
      float d[kN / 2];
      for (int k0 = 0; k0 < params.k_bytes; k0 += kBlock) {
        __syncthreads();  // the last block's operands are read
        const uint8_t* const a_from = a_global + row0 * stride + k0;
        const uint8_t* const b_from = b_global + column0 * stride + k0;
        if constexpr (kOperands == Operands::kTransposedA) {
          LoadTransposed(a_tile, a_from, stride, 64);
        } else {
          LoadSwizzled(a_tile, a_from, stride, 64);
        }
        if constexpr (kOperands == Operands::kTransposedB) {
          LoadTransposed(b_tile, b_from, stride, kN);
        } else {
          LoadSwizzled(b_tile, b_from, stride, kN);
        }
        uint32_t fragment[4][4];
        if constexpr (kOperands == Operands::kRegistersA) {
#pragma unroll
          for (int step = 0; step < 4; ++step)
            LoadFragment(fragment[step], a_from, stride, kStep * step);
        }
        ProxyFence();
        __syncthreads();
        WgmmaFence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const int k = (step + rotation) % 4;
          const int accumulate = k0 != 0 || step != 0;
          const uint32_t a_address = SharedAddress(a_tile), b_address = SharedAddress(b_tile);
          if constexpr (kOperands == Operands::kRegistersA) {
            WgmmaInstruction<Type, kN>::Registers(
                d, fragment[step], KMajorDescriptor(b_address + kStep * k), accumulate);
          } else if constexpr (kOperands == Operands::kTransposedA) {
            WgmmaInstruction<Type, kN>::SharedTransposedA(
                d, MnMajorDescriptor(a_address + 2048 * k, 8192),
                KMajorDescriptor(b_address + kStep * k), accumulate);
          } else if constexpr (kOperands == Operands::kTransposedB) {
            WgmmaInstruction<Type, kN>::SharedTransposedB(
                d, KMajorDescriptor(a_address + kStep * k),
                MnMajorDescriptor(b_address + 2048 * k, 8192), accumulate);
          } else {
            WgmmaInstruction<Type, kN>::Shared(d, KMajorDescriptor(a_address + kStep * k),
                                               KMajorDescriptor(b_address + kStep * k), accumulate);
          }
        }
        WgmmaCommit();
        WgmmaWait<0>();
        KeepRegisters(d);
      }
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
  static_assert(!kTransposed || std::is_same_v<Type, Bf16Operands>, "e4m3 is K-major");
  static_assert(kBRows * kBlock <= 32768, "B fits beside A");
}

template <typename Type, int kN, Operands kOperands>
cudaError_t Launch(ChainForm form, const ChainParams& params, cudaStream_t stream) {
  constexpr int kBytes = (64 + 256) * kBlock;
  Chain<Type, kN, kOperands>
      <<<static_cast<unsigned>(params.tiles), 128, kBytes, stream>>>(form, params);
  return cudaGetLastError();
}

template <typename Type, int kN>
cudaError_t LaunchWidth(ChainForm form, const ChainParams& params, cudaStream_t stream) {
  switch (form) {
    case ChainForm::kRegistersA:
    case ChainForm::kSwappedRegistersA:
      return Launch<Type, kN, Operands::kRegistersA>(form, params, stream);
    case ChainForm::kTransposedA:
    case ChainForm::kTransposedB:
      if constexpr (std::is_same_v<Type, Bf16Operands>) {
        return form == ChainForm::kTransposedA
                   ? Launch<Type, kN, Operands::kTransposedA>(form, params, stream)
                   : Launch<Type, kN, Operands::kTransposedB>(form, params, stream);
      }
      return cudaErrorInvalidValue;
    default:
      return Launch<Type, kN, Operands::kShared>(form, params, stream);
  }
}

template <int... kIndex>
cudaError_t Select(ChainForm form, int n, const ChainParams& params, cudaStream_t stream,
                   std::integer_sequence<int, kIndex...>) {
  cudaError_t result = cudaErrorInvalidValue;
  const auto launch = [&]<int kN>(std::integral_constant<int, kN>) {
    if (n != kN) return;
    result = params.type == ChainType::kBf16 ? LaunchWidth<Bf16Operands, kN>(form, params, stream)
                                             : LaunchWidth<E4m3Operands, kN>(form, params, stream);
  };
  (launch(std::integral_constant<int, 8 * (kIndex + 1)>()), ...);
  return result;
}

__device__ uint8_t DrawE4m3(uint64_t seed, int64_t at, int64_t row, bool negative, int kind) {
  const uint64_t bits = CounterDraw(seed, 1, static_cast<uint64_t>(at));
  uint8_t code = static_cast<uint8_t>(bits);
  if (kind == 1) {  // exponents near 1
    code = static_cast<uint8_t>((code & 0x87) | ((5 + ((bits >> 8) & 3)) << 3));
  } else if (kind == 2) {  // x, -x side by side, large
    const uint64_t pair = CounterDraw(seed, 2, static_cast<uint64_t>(at / 2));
    code = static_cast<uint8_t>(((pair & 0x7f) | 0x40) | (negative ? 0x80 : 0));
    if ((bits >> 8) % 16 == 0) code = static_cast<uint8_t>(bits & 0x8f);
  } else if (kind == 3) {
    code &= 0x87;  // exponent 0
  }
  const bool nan_row = kind == 4 && CounterDraw(seed, 3, static_cast<uint64_t>(row)) % 8 == 0;
  if (!nan_row && (code & 0x7f) == 0x7f) code ^= 1;
  return code;
}

__device__ uint16_t DrawBf16(uint64_t seed, int64_t at, int64_t row, bool negative, int kind) {
  const uint64_t bits = CounterDraw(seed, 1, static_cast<uint64_t>(at));
  const uint16_t fraction = bits & 0x807f;  // and the sign
  const auto with_exponent = [&](uint64_t exponent) {
    return static_cast<uint16_t>(fraction | (exponent << 7));
  };
  // Every row has an exponent of its own, every value another near it: sums meet all alignments.
  const uint64_t of_row = CounterDraw(seed, 4, static_cast<uint64_t>(row));
  switch (kind) {
    case 0:
      return with_exponent(66 + of_row % 100 + (bits >> 16) % 22);
    case 1:
      return with_exponent(125 + (bits >> 16) % 4);
    case 2: {
      const uint64_t pair = CounterDraw(seed, 2, static_cast<uint64_t>(at / 2));
      if ((bits >> 16) % 16 == 0) return with_exponent(100 + (bits >> 20) % 30);
      const uint64_t exponent = 135 + (pair >> 16) % 6;
      return static_cast<uint16_t>((pair & 0x7f) | (exponent << 7) | (negative ? 0x8000 : 0));
    }
    case 3:  // subnormals and zeros on one side, up to their inverses on the other
      return with_exponent((of_row >> 8) % 2 == 0 ? 0 : 100 + (bits >> 16) % 150);
    default: {
      const uint16_t code = static_cast<uint16_t>(bits);
      const bool any = of_row % 8 == 0;
      return !any && (code & 0x7f80) == 0x7f80 ? code ^ 0x4000 : code;
    }
  }
}

__global__ void FillCodes(ChainType type, ChainSide side, uint8_t* codes, int k_bytes) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int cols = type == ChainType::kBf16 ? k_bytes / 2 : k_bytes;
  const int64_t row = at / cols;
  const int kind = static_cast<int>((row / kSide) % 5);
  const bool negative = side == ChainSide::kWeights && at % 2 == 1;
  const uint64_t seed = side == ChainSide::kWeights ? 1 : 2;
  if (type == ChainType::kBf16) {
    reinterpret_cast<uint16_t*>(codes)[at] = DrawBf16(seed, at, row, negative, kind);
  } else {
    codes[at] = DrawE4m3(seed, at, row, negative, kind);
  }
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
    case ChainForm::kTransposedA:
      return "weights A, MN-major";
    case ChainForm::kTransposedB:
      return "tokens B, MN-major";
    case ChainForm::kBatchDependent:
      return "rotated K steps";
  }
  return "?";
}

cudaError_t LaunchChain(ChainForm form, int n, const ChainParams& params, cudaStream_t stream) {
  return Select(form, n, params, stream, std::make_integer_sequence<int, 32>());
}

cudaError_t LaunchFillCodes(ChainType type, ChainSide side, uint8_t* codes, int64_t tiles,
                            int k_bytes, cudaStream_t stream) {
  const int64_t count = tiles * kSide * (type == ChainType::kBf16 ? k_bytes / 2 : k_bytes);
  FillCodes<<<static_cast<unsigned>(count / 256), 256, 0, stream>>>(type, side, codes, k_bytes);
  return cudaGetLastError();
}

}  // namespace moebius::kernels::cuda
