#include "kernels/cuda/row_digest/row_digest.h"

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/row_digest/xxh3.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "RowDigest";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStripesAtOnce = 32 / xxh3::kStripeLanes;
constexpr int kMaxBlocks = 2 * kRowDigestMaxDim / xxh3::kBlockBytes;

struct Args {
  int dim;
  const uint16_t* hidden;
  int64_t hidden_stride;
  const float* logprobs;
  unsigned long long* digests;
};

__device__ __forceinline__ uint64_t ShuffleXor(uint64_t x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(x), lanes);
}

// kAligned: every row begins at a multiple of 8 bytes.
template <bool kAligned>
__device__ __forceinline__ uint64_t ReadLane(const uint16_t* from) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const uint64_t*>(from);
  } else {
    return xxh3::Read64(from);
  }
}

// What `stripes` stripes from `from` add to lane threadIdx.x % 8, in every thread of the warp.
// Additions modulo 2^64 have no order.
template <bool kAligned>
__device__ __forceinline__ uint64_t SumStripes(const uint16_t* from, int stripes,
                                               const uint64_t* secret) {
  const int lane = static_cast<int>(threadIdx.x) % xxh3::kStripeLanes;
  const int first = static_cast<int>(threadIdx.x) % 32 / xxh3::kStripeLanes;
  uint64_t products = 0, data = 0;
#pragma unroll
  for (int i = 0; i < xxh3::kBlockStripes; i += kStripesAtOnce) {
    const int stripe = i + first;
    if (stripe >= stripes) continue;
    const uint64_t word = ReadLane<kAligned>(from + stripe * (xxh3::kStripeBytes / 2) + lane * 4);
    products += xxh3::LaneProduct(word, secret[stripe + lane]);
    data += word;
  }
#pragma unroll
  for (int offset = xxh3::kStripeLanes; offset < 32; offset *= 2) {
    products += ShuffleXor(products, offset);
    data += ShuffleXor(data, offset);
  }
  return products + ShuffleXor(data, 1);
}

// The first warp, from the sums of all blocks: the chain of scrambles, the last stripe, the merge.
__device__ __forceinline__ uint64_t Merge(const uint16_t* row, int bytes, int blocks,
                                          const uint64_t (*sums)[xxh3::kStripeLanes],
                                          const uint64_t* secret) {
  const int lane = static_cast<int>(threadIdx.x) % xxh3::kStripeLanes;
  // The last 64 bytes, whatever stripes they overlap.
  const uint64_t last = xxh3::Read64(row + bytes / 2 - xxh3::kStripeBytes / 2 + lane * 4);
  uint64_t sum = xxh3::InitialLane(lane);
  for (int block = 0; block < blocks; ++block) {
    sum += sums[block][lane];
    if (block < blocks - 1) sum = xxh3::Scramble(sum, secret[16 + lane]);
  }
  sum += xxh3::LaneProduct(last, xxh3::SecretAt(secret, 121 + 8 * lane)) + ShuffleXor(last, 1);
  const uint64_t mixed = sum ^ xxh3::SecretAt(secret, 11 + 8 * lane);
  // Lanes 0, 2, 4, 6 (all threads alike) fold with their neighbours; then four terms are added.
  uint64_t hash = xxh3::FoldedProduct(mixed, ShuffleXor(mixed, 1));
  hash += ShuffleXor(hash, 2);
  hash += ShuffleXor(hash, 4);
  return xxh3::Avalanche(hash + static_cast<uint64_t>(bytes) * xxh3::kPrime64_1);
}

// A block hashes a row; a warp sums kilobytes warp, + 8, .. of it.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) RowDigest(const Args args) {
  __shared__ uint64_t secret[xxh3::kSecretWords];
  __shared__ uint64_t sums[kMaxBlocks][xxh3::kStripeLanes];
  WaitForPrecedingKernel();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t at = blockIdx.x;
  const uint16_t* const row = args.hidden + at * args.hidden_stride;
  const int bytes = 2 * args.dim;
  const uint64_t seed = __float_as_uint(args.logprobs[at]);
  if (bytes <= xxh3::kShortBytes) {
    if (thread == 0) args.digests[at] = xxh3::ShortDigest(row, args.dim, xxh3::kSecret, seed);
    return;
  }
  if (thread < xxh3::kSecretWords) secret[thread] = xxh3::SeededSecretWord(thread, seed);
  __syncthreads();
  LetNextKernelStart();
  // The last block ends before the last byte; what it leaves of a stripe is in the last stripe.
  const int blocks = (bytes - 1) / xxh3::kBlockBytes + 1;
  for (int block = thread / 32; block < blocks; block += kWarps) {
    const int stripes = block < blocks - 1
                            ? xxh3::kBlockStripes
                            : (bytes - 1 - block * xxh3::kBlockBytes) / xxh3::kStripeBytes;
    const uint64_t sum =
        SumStripes<kAligned>(row + block * (xxh3::kBlockBytes / 2), stripes, secret);
    if (thread % 32 < xxh3::kStripeLanes) sums[block][thread % 32] = sum;
  }
  __syncthreads();
  if (thread >= 32) return;
  const uint64_t digest = Merge(row, bytes, blocks, sums, secret);
  if (thread == 0) args.digests[at] = digest;
}

}  // namespace

absl::Status LaunchRowDigest(const RowDigestParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "dim", p.dim, 1, kRowDigestMaxDim));
  RETURN_IF_ERROR(CheckRange(kOp, "hidden_stride", p.hidden_stride, p.dim, INT64_MAX));
  RETURN_IF_ERROR(CheckPointer(kOp, "hidden", p.hidden, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "logprobs", p.logprobs, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "digests", p.digests, 8));
  const Args args{static_cast<int>(p.dim), reinterpret_cast<const uint16_t*>(p.hidden),
                  p.hidden_stride, p.logprobs, reinterpret_cast<unsigned long long*>(p.digests)};
  const bool aligned = reinterpret_cast<uintptr_t>(p.hidden) % 8 == 0 && p.hidden_stride % 4 == 0;
  const auto kernel = aligned ? RowDigest<true> : RowDigest<false>;
  return LaunchDependent(kOp, kernel, dim3(static_cast<unsigned>(p.m)), kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
