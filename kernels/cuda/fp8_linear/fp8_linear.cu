#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/fp8_linear/fp8_linear.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int kBlock = 128;  // of K: one scale on either side
constexpr int kSharedBytes = 200 * 1024;

struct Shape {
  int m, n, k_blocks;
  const float* x_scales;
  const float* weight_scales;
  uint16_t* out;
  int64_t out_stride;
};

// Rows of weights (64 a warpgroup) and of tokens of a tile, and its stages in shared memory.
template <int kTokens, int kGroups>
struct Tile {
  static constexpr int kWeightBytes = 64 * kGroups * kBlock;
  static constexpr int kTokenBytes = kTokens * kBlock;
  static constexpr int kScaleBytes = (kTokens * 4 + 127) / 128 * 128;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kStages = kSharedBytes / (kStageBytes + kScaleBytes) < 12
                                     ? kSharedBytes / (kStageBytes + kScaleBytes)
                                     : 12;
  static constexpr int kBytes = 1024 + kStages * (kStageBytes + kScaleBytes);
};

// bf16 bits, nearest even; a NaN keeps its sign and becomes the quiet NaN of base/float_formats.h.
__device__ __forceinline__ uint16_t RoundToBf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | 0x7fc0u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// One CTA: warpgroups 0 .. kGroups - 1 multiply, one warp more keeps copies in flight.
template <int kTokens, int kGroups>
__global__ void __launch_bounds__(128 * kGroups + 32, 1)
    Fp8Linear(const __grid_constant__ CUtensorMap weights,
              const __grid_constant__ CUtensorMap tokens, const Shape shape) {
  using T = Tile<kTokens, kGroups>;
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[T::kStages], empty[T::kStages];
  uint8_t* const stages = unaligned + (1024 - SharedAddress(unaligned) % 1024) % 1024;
  float* const scales = reinterpret_cast<float*>(stages + T::kStages * T::kStageBytes);
  const int weight0 = blockIdx.x * 64 * kGroups;
  const int token0 = blockIdx.y * kTokens;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      BarrierInit(&full[s], 1 + 32);  // the copy engine's arrival, and each lane's scales
      BarrierInit(&empty[s], 4 * kGroups);
    }
    BarrierInitFence();
  }
  __syncthreads();

  if (warp == 4 * kGroups) {
    if (lane == 0) {
      PrefetchTensorMap(&weights);
      PrefetchTensorMap(&tokens);
    }
    for (int block = 0; block < shape.k_blocks; ++block) {
      const int s = block % T::kStages;
      if (block >= T::kStages) BarrierWait(&empty[s], (block / T::kStages - 1) % 2);
      uint8_t* const stage = stages + s * T::kStageBytes;
      if (lane == 0) {
        BarrierArriveExpect(&full[s], T::kStageBytes);
        TmaLoad2d(stage, &weights, &full[s], block * kBlock, weight0, kEvictFirst);
        TmaLoad2d(stage + T::kWeightBytes, &tokens, &full[s], block * kBlock, token0, kEvictLast);
      }
      for (int t = lane; t < kTokens; t += 32) {
        // Rows beyond m are computed with any scale of a row that exists, and not stored.
        const int row = min(token0 + t, shape.m - 1);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                         SharedAddress(scales + s * (T::kScaleBytes / 4) + t)),
                     "l"(shape.x_scales + static_cast<int64_t>(row) * shape.k_blocks + block)
                     : "memory");
      }
      asm volatile(
          "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(&full[s]))
          : "memory");
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  const int group = warp / 4;
  const int first_row = weight0 + 64 * group;
  const float* const weight_scale =
      shape.weight_scales +
      static_cast<int64_t>(min(first_row, shape.n - 1) / kBlock) * shape.k_blocks;
  float sum[kTokens / 2];
  float part[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.0f;
  for (int block = 0; block < shape.k_blocks; ++block) {
    const int s = block % T::kStages;
    const float scale_w = __ldg(weight_scale + block);
    BarrierWait(&full[s], (block / T::kStages) % 2);
    const uint32_t stage = SharedAddress(stages + s * T::kStageBytes);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kBlock / 32; ++step) {
      WgmmaInstruction<E4m3Operands, kTokens>::Shared(
          part, KMajorDescriptor(stage + group * 64 * kBlock + 32 * step),
          KMajorDescriptor(stage + T::kWeightBytes + 32 * step), step != 0);
    }
    WgmmaCommit();
    WgmmaWait<0>();
    KeepRegisters(part);
    const float* const scale_x = scales + s * (T::kScaleBytes / 4);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(scale_x + 8 * j + 2 * (lane % 4));
      const float scale[2] = {__fmul_rn(pair.x, scale_w), __fmul_rn(pair.y, scale_w)};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sum[4 * j + c] = __fmaf_rn(scale[c % 2], part[4 * j + c], sum[4 * j + c]);
    }
    __syncwarp();
    if (lane == 0) BarrierArrive(&empty[s]);
  }
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int row = first_row + 16 * (warp % 4) + lane / 4 + 8 * ((i % 4) / 2);
    const int token = token0 + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    if (row < shape.n && token < shape.m)
      shape.out[token * shape.out_stride + row] = RoundToBf16(sum[i]);
  }
}

template <int kTokens, int kGroups>
absl::Status Launch(const Fp8LinearParams& p, const Shape& shape, cudaStream_t stream) {
  using T = Tile<kTokens, kGroups>;
  MatrixMap map;
  map.rows = static_cast<uint64_t>(p.n);
  map.cols = map.row_stride_bytes = static_cast<uint64_t>(p.k);
  map.base = p.weight;
  map.box_cols = kBlock;
  map.box_rows = 64 * kGroups;
  ASSIGN_OR_RETURN(const CUtensorMap weights, EncodeMatrixMap(map));
  map.rows = static_cast<uint64_t>(p.m);
  map.base = p.x;
  map.box_rows = kTokens;
  ASSIGN_OR_RETURN(const CUtensorMap tokens, EncodeMatrixMap(map));
  const auto kernel = Fp8Linear<kTokens, kGroups>;
  RETURN_IF_ERROR(
      ToStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kBytes),
               "Fp8Linear"));
  const dim3 grid(static_cast<unsigned>((p.n + 64 * kGroups - 1) / (64 * kGroups)),
                  static_cast<unsigned>((p.m + kTokens - 1) / kTokens));
  kernel<<<grid, 128 * kGroups + 32, T::kBytes, stream>>>(weights, tokens, shape);
  return LaunchStatus("Fp8Linear");
}

absl::Status Validate(const Fp8LinearParams& p) {
  const auto bad = [](const char* field, int64_t value) {
    return absl::InvalidArgumentError(absl::StrCat("Fp8Linear: ", field, " is ", value));
  };
  constexpr int64_t kMost = int64_t{1} << 22;  // rows: 65,535 tiles of 64 and more
  if (p.m < 0 || p.m > kMost) return bad("m", p.m);
  if (p.n <= 0 || p.n > kMost) return bad("n", p.n);
  if (p.k <= 0 || p.k > kMost || p.k % 16 != 0) return bad("k", p.k);
  if (p.out_stride < p.n) return bad("out_stride", p.out_stride);
  for (const void* pointer : {static_cast<const void*>(p.x), static_cast<const void*>(p.weight)}) {
    if (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
      return absl::InvalidArgumentError("Fp8Linear: x or weight is null or not 16-aligned");
    }
  }
  if (p.x_scales == nullptr || p.weight_scales == nullptr || p.out == nullptr) {
    return absl::InvalidArgumentError("Fp8Linear: a scale or output pointer is null");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status LaunchFp8Linear(const Fp8LinearParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const Shape shape{static_cast<int>(p.m),
                    static_cast<int>(p.n),
                    static_cast<int>((p.k + kBlock - 1) / kBlock),
                    p.x_scales,
                    p.weight_scales,
                    reinterpret_cast<uint16_t*>(p.out),
                    p.out_stride};
  if (p.m <= 8) return Launch<8, 1>(p, shape, stream);
  if (p.m <= 16) return Launch<16, 1>(p, shape, stream);
  if (p.m <= 32) return Launch<32, 1>(p, shape, stream);
  if (p.m <= 64) return Launch<64, 1>(p, shape, stream);
  return Launch<128, 2>(p, shape, stream);
}

}  // namespace moebius::kernels::cuda
