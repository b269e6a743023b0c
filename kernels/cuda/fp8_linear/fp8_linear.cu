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

struct Shape {
  int m, n, k_blocks;
  int segments;  // of K: the CTAs of a cluster
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
  // One warpgroup: two CTAs share a multiprocessor, so that one loads while the other ends, and
  // clusters of four find room.
  static constexpr int kCtas = kGroups == 1 ? 2 : 1;
  static constexpr int kMostStages =
      (kGroups == 1 ? 108 : 200) * 1024 / (kStageBytes + kScaleBytes);
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;
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
__global__ void __launch_bounds__(128 * kGroups + 32, Tile<kTokens, kGroups>::kCtas)
    Fp8Linear(const __grid_constant__ CUtensorMap weights,
              const __grid_constant__ CUtensorMap tokens, const Shape shape) {
  using T = Tile<kTokens, kGroups>;
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[T::kStages], empty[T::kStages];
  uint8_t* const stages = unaligned + (1024 - SharedAddress(unaligned) % 1024) % 1024;
  float* const scales = reinterpret_cast<float*>(stages + T::kStages * T::kStageBytes);
  const int weight0 = blockIdx.x * 64 * kGroups;
  const int token0 = blockIdx.y * kTokens;
  const int segment_blocks = (shape.k_blocks + shape.segments - 1) / shape.segments;
  const int block0 = static_cast<int>(blockIdx.z) * segment_blocks;
  const int blocks = min(segment_blocks, shape.k_blocks - block0);
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
    for (int block = 0; block < blocks; ++block) {
      const int s = block % T::kStages;
      if (block >= T::kStages) BarrierWait(&empty[s], (block / T::kStages - 1) % 2);
      uint8_t* const stage = stages + s * T::kStageBytes;
      if (lane == 0) {
        BarrierArriveExpect(&full[s], T::kStageBytes);
        TmaLoad2d(stage, &weights, &full[s], (block0 + block) * kBlock, weight0, kEvictFirst);
        TmaLoad2d(stage + T::kWeightBytes, &tokens, &full[s], (block0 + block) * kBlock, token0,
                  kEvictLast);
      }
      for (int t = lane; t < kTokens; t += 32) {
        // Rows beyond m are computed with any scale of a row that exists, and not stored.
        const int row = min(token0 + t, shape.m - 1);
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                SharedAddress(scales + s * (T::kScaleBytes / 4) + t)),
            "l"(shape.x_scales + static_cast<int64_t>(row) * shape.k_blocks + block0 + block)
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
      static_cast<int64_t>(min(first_row, shape.n - 1) / kBlock) * shape.k_blocks + block0;
  float sum[kTokens / 2];
  float part[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.0f;
  for (int block = 0; block < blocks; ++block) {
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
  if (shape.segments > 1) {
    // The sums of later segments, through their CTAs' shared memory, in ascending order.
    float* const exchange = reinterpret_cast<float*>(stages);  // [kTokens / 2][threads]
    constexpr int kThreads = 128 * kGroups;
    NamedBarrier(1, kThreads);  // nobody reads the last stages any more
    if (blockIdx.z > 0) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) exchange[i * kThreads + threadIdx.x] = sum[i];
    }
    ClusterBarrier();
    if (blockIdx.z == 0) {
      for (int segment = 1; segment < shape.segments; ++segment) {
        const uint32_t remote = ClusterAddress(SharedAddress(exchange + threadIdx.x), segment);
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          sum[i] = __fadd_rn(sum[i], LoadCluster(remote + i * kThreads * 4));
        }
      }
    }
    ClusterBarrier();  // and only now may the others leave
    if (blockIdx.z > 0) return;
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
                  static_cast<unsigned>((p.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>(shape.segments));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(128 * kGroups + 32);
  config.dynamicSmemBytes = T::kBytes;
  config.stream = stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, 1, static_cast<unsigned>(shape.segments)};
  config.attrs = &cluster;
  config.numAttrs = 1;
  return ToStatus(cudaLaunchKernelEx(&config, kernel, weights, tokens, shape), "Fp8Linear");
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

int Fp8LinearSegments(int64_t n, int64_t k) {
  const int64_t tiles = (n + 63) / 64;
  if ((k + kBlock - 1) / kBlock < 16) return 1;
  return tiles <= 40 ? 4 : tiles <= 72 ? 2 : 1;
}

absl::Status LaunchFp8Linear(const Fp8LinearParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const Shape shape{static_cast<int>(p.m),
                    static_cast<int>(p.n),
                    static_cast<int>((p.k + kBlock - 1) / kBlock),
                    Fp8LinearSegments(p.n, p.k),
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
