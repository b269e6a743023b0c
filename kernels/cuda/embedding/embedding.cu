#include "kernels/cuda/embedding/embedding.h"

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/row_vector.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "Embedding";
constexpr int kThreads = 128;

struct Args {
  int m, vocab, dim;
  const uint16_t* table;
  const TokenId* ids;
  uint16_t* out;
};

// Block (i, j) copies 1,024 neighbouring elements of kRows rows, 8 of each a thread.
template <int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads) Embedding(const Args args) {
  WaitForPrecedingKernel();
  const int64_t first = int64_t{blockIdx.x} * kRows;
  const int at = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kVectorElements;
  RowVector x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= args.m) continue;
    const TokenId id = args.ids[first + r];
    if (id >= 0 && id < args.vocab) {
      x[r] = LoadVector<kAligned>(args.table + static_cast<int64_t>(id) * args.dim, at, args.dim);
    } else {
      for (uint32_t& pair : x[r].pair) pair = 0x7fc07fc0u;
    }
  }
  LetNextKernelStart();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r < args.m)
      StoreVector<kAligned>(x[r], args.out + (first + r) * args.dim, at, args.dim);
  }
}

}  // namespace

absl::Status LaunchEmbedding(const EmbeddingParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "vocab", p.vocab, 1, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "dim", p.dim, 1, 1 << 20));
  RETURN_IF_ERROR(CheckPointer(kOp, "table", p.table, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "ids", p.ids, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "out", p.out, 2));
  const Args args{static_cast<int>(p.m),
                  static_cast<int>(p.vocab),
                  static_cast<int>(p.dim),
                  reinterpret_cast<const uint16_t*>(p.table),
                  p.ids,
                  reinterpret_cast<uint16_t*>(p.out)};
  const bool aligned =
      VectorsAreAligned(p.table, p.dim, p.dim) && VectorsAreAligned(p.out, p.dim, p.dim);
  // As in quantize_rows: with many rows, more in flight a thread.
  const bool many = aligned && p.m * p.dim > int64_t{1} << 21;
  const int64_t rows = many ? 2 : 1;
  constexpr int kBlockElements = kThreads * kVectorElements;
  const dim3 grid(static_cast<unsigned>((p.m + rows - 1) / rows),
                  static_cast<unsigned>((p.dim + kBlockElements - 1) / kBlockElements));
  const auto kernel = many      ? Embedding<2, true>
                      : aligned ? Embedding<1, true>
                                : Embedding<1, false>;
  return LaunchDependent(kOp, kernel, grid, kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
