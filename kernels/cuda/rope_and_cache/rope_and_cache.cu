#include "kernels/cuda/rope_and_cache/rope_and_cache.h"

#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/row_statistics.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "RopeAndCache";
constexpr int kThreads = 256;
constexpr int kQueryVectors = 4;  // a thread has in flight
constexpr int64_t kMaxRank = kThreads * kStatisticsVectors * kVectorElements;

struct Args {
  int heads, nope, rope, rank;
  int vectors_per_head;  // ceil(rope / 8)
  const uint16_t* q;
  uint16_t* q_absorbed;
  const uint16_t* kv;
  int64_t kv_stride;
  const float* kv_norm;
  float eps;
  const float* cos_sin;
  const SequenceRow* rows;
  uint16_t* cache;
};

// Four pairs from element `at` of a rope part at one position. kAligned: rope is a multiple of 8.
template <bool kAligned>
__device__ __forceinline__ RowVector Rotate(const RowVector& x, const float* cos_sin, int at,
                                            int rope) {
  float factor[kVectorElements];
  LoadWeights<kAligned>(cos_sin, at, rope, factor);
  return RoundedVector([&](int i) {
    const int pair = i / 2 * 2;
    const float even = x.At(pair), odd = x.At(pair + 1);
    const float cos = factor[pair], sin = factor[pair + 1];
    return i % 2 == 0 ? __fsub_rn(__fmul_rn(even, cos), __fmul_rn(odd, sin))
                      : __fadd_rn(__fmul_rn(even, sin), __fmul_rn(odd, cos));
  });
}

// The latent-cache row of one token. What does not depend on its position is loaded first.
template <bool kAligned>
__device__ __forceinline__ void WriteCacheRow(const Args& args, int row, float* parts) {
  const int rank = args.rank;
  const int threads = StatisticsThreads(rank), thread = static_cast<int>(threadIdx.x);
  const uint16_t* const kv = args.kv + row * args.kv_stride;
  int at[kStatisticsVectors];
  RowVector x[kStatisticsVectors];
  float weight[kStatisticsVectors][kVectorElements];
#pragma unroll
  for (int v = 0; v < kStatisticsVectors; ++v) {
    // Threads beyond the tree's hold nothing.
    at[v] = thread < threads ? (thread + v * threads) * kVectorElements : rank;
    x[v] = LoadVector<kAligned>(kv, at[v], rank);
    LoadWeights<kAligned>(args.kv_norm, at[v], rank, weight[v]);
  }
  // The rope key, from the last thread down, which has least to do otherwise.
  const int key_vector = kThreads - 1 - thread;
  const bool has_key = key_vector < args.vectors_per_head;
  const int key_at = has_key ? key_vector * kVectorElements : args.rope;
  const RowVector key = LoadVector<kAligned>(kv + rank, key_at, args.rope);
  const SequenceRow sequence = args.rows[row];
  const int64_t block = sequence.block_table[sequence.position / kCacheBlockTokens];
  uint16_t* const to =
      args.cache +
      (block * kCacheBlockTokens + sequence.position % kCacheBlockTokens) * (rank + args.rope);
  const RowVector rotated = Rotate<kAligned>(
      key, args.cos_sin + static_cast<int64_t>(sequence.position) * args.rope, key_at, args.rope);

  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kStatisticsVectors; ++v) squares = AddSquares(x[v], squares);
  const float inverse = InverseRms(FoldBlock(squares, parts), rank, args.eps);
#pragma unroll
  for (int v = 0; v < kStatisticsVectors; ++v) {
    const RowVector normed = RoundedVector(
        [&](int i) { return __fmul_rn(__fmul_rn(x[v].At(i), inverse), weight[v][i]); });
    StoreVector<kAligned>(normed, to, at[v], rank);
  }
  StoreVector<kAligned>(rotated, to + rank, key_at, args.rope);
}

// Rotates the vectors first, + 256, .. of a row's heads.
template <bool kAligned>
__device__ __forceinline__ void RotateQuery(const Args& args, int row, int first) {
  RowVector x[kQueryVectors];
  int64_t row_head[kQueryVectors];
  int at[kQueryVectors];
#pragma unroll
  for (int i = 0; i < kQueryVectors; ++i) {
    const int vector = first + i * kThreads;
    const int head = vector / args.vectors_per_head;
    row_head[i] = static_cast<int64_t>(row) * args.heads + head;
    // Past the last head there is nothing to read or write.
    at[i] = head < args.heads ? vector % args.vectors_per_head * kVectorElements : args.rope;
    x[i] = LoadVector<kAligned>(args.q + row_head[i] * (args.nope + args.rope) + args.nope, at[i],
                                args.rope);
  }
  const float* const cos_sin =
      args.cos_sin + static_cast<int64_t>(args.rows[row].position) * args.rope;
#pragma unroll
  for (int i = 0; i < kQueryVectors; ++i) x[i] = Rotate<kAligned>(x[i], cos_sin, at[i], args.rope);
  LetNextKernelStart();
#pragma unroll
  for (int i = 0; i < kQueryVectors; ++i) {
    StoreVector<kAligned>(x[i], args.q_absorbed + row_head[i] * (args.rank + args.rope) + args.rank,
                          at[i], args.rope);
  }
}

// Block (row, 0) writes the cache row, block (row, 1 + i) rotates vectors i * 1,024 .. of q's
// heads.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) RopeAndCache(const Args args) {
  __shared__ __align__(16) float parts[32];
  WaitForPrecedingKernel();
  const int row = static_cast<int>(blockIdx.x);
  if (blockIdx.y == 0) {
    WriteCacheRow<kAligned>(args, row, parts);
  } else {
    RotateQuery<kAligned>(
        args, row, static_cast<int>((blockIdx.y - 1) * kThreads * kQueryVectors + threadIdx.x));
  }
}

absl::Status Validate(const RopeAndCacheParams& p) {
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "dims.num_heads", p.dims.num_heads, 1, 8192));
  RETURN_IF_ERROR(CheckRange(kOp, "dims.qk_nope_head_dim", p.dims.qk_nope_head_dim, 0, 1 << 20));
  RETURN_IF_ERROR(CheckRange(kOp, "dims.kv_lora_rank", p.dims.kv_lora_rank, 1, kMaxRank));
  RETURN_IF_ERROR(CheckRange(kOp, "dims.qk_rope_head_dim", p.dims.qk_rope_head_dim, 2, 1024));
  if (p.dims.qk_rope_head_dim % 2 != 0) return Refuse(kOp, "dims.qk_rope_head_dim is odd");
  RETURN_IF_ERROR(CheckRange(kOp, "kv_stride", p.kv_stride, p.dims.latent_dim(), INT64_MAX));
  RETURN_IF_ERROR(CheckPointer(kOp, "q", p.q, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "q_absorbed", p.q_absorbed, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "kv", p.kv, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "kv_norm", p.kv_norm, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "cos_sin", p.cos_sin, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "rows", p.rows, 8));
  return CheckPointer(kOp, "cache", p.cache, 2);
}

bool Aligned(const RopeAndCacheParams& p) {
  const MlaDims& d = p.dims;
  return VectorsAreAligned(p.q, d.qk_nope_head_dim, d.qk_rope_head_dim) &&
         VectorsAreAligned(p.q_absorbed, d.kv_lora_rank, d.kv_lora_rank) &&
         VectorsAreAligned(p.kv, p.kv_stride, d.latent_dim()) &&
         VectorsAreAligned(p.cache, d.kv_lora_rank, d.latent_dim()) &&
         VectorsAreAligned(p.kv_norm, 8, 8) && VectorsAreAligned(p.cos_sin, 8, 8);
}

}  // namespace

absl::Status LaunchRopeAndCache(const RopeAndCacheParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  Args args;
  args.heads = static_cast<int>(p.dims.num_heads);
  args.nope = static_cast<int>(p.dims.qk_nope_head_dim);
  args.rope = static_cast<int>(p.dims.qk_rope_head_dim);
  args.rank = static_cast<int>(p.dims.kv_lora_rank);
  args.vectors_per_head = (args.rope + kVectorElements - 1) / kVectorElements;
  args.q = reinterpret_cast<const uint16_t*>(p.q);
  args.q_absorbed = reinterpret_cast<uint16_t*>(p.q_absorbed);
  args.kv = reinterpret_cast<const uint16_t*>(p.kv);
  args.kv_stride = p.kv_stride;
  args.kv_norm = p.kv_norm;
  args.eps = p.kv_norm_eps;
  args.cos_sin = p.cos_sin;
  args.rows = p.rows;
  args.cache = reinterpret_cast<uint16_t*>(p.cache);
  const int vectors = args.heads * args.vectors_per_head;
  constexpr int kBlockVectors = kThreads * kQueryVectors;
  const dim3 grid(static_cast<unsigned>(p.m),
                  static_cast<unsigned>(1 + (vectors + kBlockVectors - 1) / kBlockVectors));
  const auto kernel = Aligned(p) ? RopeAndCache<true> : RopeAndCache<false>;
  return LaunchDependent(kOp, kernel, grid, kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
