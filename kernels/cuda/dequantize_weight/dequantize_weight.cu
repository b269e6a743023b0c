#include "kernels/cuda/dequantize_weight/dequantize_weight.h"

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/row_vector.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "DequantizeWeight";
constexpr int kBlock = 128;  // rows and columns that share a scale

// A thread converts 8 neighbouring codes of four rows, which are in one block; a CTA 512 columns of
// sixteen rows.
constexpr int kThreads = 256;
constexpr int kColumnThreads = 64;
constexpr int kCtaColumns = kColumnThreads * kVectorElements;
constexpr int kThreadRows = 4;
constexpr int kCtaRows = kThreads / kColumnThreads * kThreadRows;
static_assert(kBlock % kThreadRows == 0 && kBlock % kVectorElements == 0, "one scale a thread");

struct Args {
  int64_t n;
  int k;
  const uint8_t* weight;
  const float* scales;
  uint16_t* out;
};

// Codes [at, at + 8) of a row, the first in the lowest byte; those past the end are zero.
template <bool kAligned>
__device__ __forceinline__ uint2 LoadCodes(const uint8_t* row, int at, int k) {
  uint2 codes = {0, 0};
  if constexpr (kAligned) {
    if (at < k) codes = *reinterpret_cast<const uint2*>(row + at);
  } else {
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
      if (at + i < k) (i < 4 ? codes.x : codes.y) |= uint32_t{row[at + i]} << (8 * (i % 4));
    }
  }
  return codes;
}

// The values of two codes. Every finite code is a half, so both steps are exact.
__device__ __forceinline__ void PairToFloat(uint32_t codes, float& low, float& high) {
  asm("{\n.reg .b16 l, h;\n.reg .b32 halves;\n"
      "cvt.rn.f16x2.e4m3x2 halves, %2;\n"
      "mov.b32 {l, h}, halves;\n"
      "cvt.f32.f16 %0, l;\n"
      "cvt.f32.f16 %1, h;\n}"
      : "=f"(low), "=f"(high)
      : "h"(static_cast<uint16_t>(codes)));
}

// Whether one of four codes is 0x7f or 0xff.
__device__ __forceinline__ bool AnyNanCode(uint32_t codes) {
  return (((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0;
}

__device__ __forceinline__ RowVector Dequantize(uint2 codes, float scale) {
  float x[kVectorElements];
#pragma unroll
  for (int i = 0; i < kVectorElements; i += 2)
    PairToFloat((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)), x[i], x[i + 1]);
#pragma unroll
  for (int i = 0; i < kVectorElements; ++i) x[i] = __fmul_rn(x[i], scale);
  if (AnyNanCode(codes.x) || AnyNanCode(codes.y)) {
    // The conversion and the product lose a NaN's sign.
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
      const uint32_t code = ((i < 4 ? codes.x : codes.y) >> (8 * (i % 4))) & 0xffu;
      if ((code & 0x7fu) == 0x7fu) x[i] = __uint_as_float((code & 0x80u) << 24 | 0x7fc00000u);
    }
  }
  return RoundVector(x);
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) DequantizeWeight(const Args args) {
  const int at = static_cast<int>(blockIdx.y) * kCtaColumns +
                 static_cast<int>(threadIdx.x % kColumnThreads) * kVectorElements;
  const int64_t first = int64_t{blockIdx.x} * kCtaRows + threadIdx.x / kColumnThreads * kThreadRows;
  if (at >= args.k || first >= args.n) return;
  WaitForPrecedingKernel();
  uint2 codes[kThreadRows];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (first + r < args.n)
      codes[r] = LoadCodes<kAligned>(args.weight + (first + r) * args.k, at, args.k);
  }
  const float scale = args.scales[first / kBlock * ((args.k + kBlock - 1) / kBlock) + at / kBlock];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (first + r < args.n) {
      StoreVector<kAligned>(Dequantize(codes[r], scale), args.out + (first + r) * args.k, at,
                            args.k);
    }
  }
}

}  // namespace

absl::Status LaunchDequantizeWeight(const DequantizeWeightParams& p, cudaStream_t stream) {
  if (p.n == 0 || p.k == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CheckRange(kOp, "n", p.n, 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "k", p.k, 0, 1 << 24));
  RETURN_IF_ERROR(CheckPointer(kOp, "weight", p.weight, 1));
  RETURN_IF_ERROR(CheckPointer(kOp, "weight_scales", p.weight_scales, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "out", p.out, 2));
  const Args args{p.n, static_cast<int>(p.k), reinterpret_cast<const uint8_t*>(p.weight),
                  p.weight_scales, reinterpret_cast<uint16_t*>(p.out)};
  const bool aligned = reinterpret_cast<uintptr_t>(p.weight) % kVectorElements == 0 &&
                       VectorsAreAligned(p.out, p.k, p.k);
  const dim3 grid(static_cast<unsigned>((p.n + kCtaRows - 1) / kCtaRows),
                  static_cast<unsigned>((p.k + kCtaColumns - 1) / kCtaColumns));
  return LaunchDependent(kOp, aligned ? DequantizeWeight<true> : DequantizeWeight<false>, grid,
                         kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
