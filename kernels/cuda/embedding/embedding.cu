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
  int vocab, dim;
  const uint16_t* table;
  const TokenId* ids;
  uint16_t* out;
};

// Block (row, i) copies 1,024 neighbouring elements, 8 a thread.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) Embedding(const Args args) {
  WaitForPrecedingKernel();
  const int64_t row = blockIdx.x;
  const int at = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kVectorElements;
  const TokenId id = args.ids[row];
  RowVector x;
  if (id >= 0 && id < args.vocab) {
    x = LoadVector<kAligned>(args.table + static_cast<int64_t>(id) * args.dim, at, args.dim);
  } else {
    for (uint32_t& pair : x.pair) pair = 0x7fc07fc0u;
  }
  LetNextKernelStart();
  StoreVector<kAligned>(x, args.out + row * args.dim, at, args.dim);
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
  const Args args{static_cast<int>(p.vocab), static_cast<int>(p.dim),
                  reinterpret_cast<const uint16_t*>(p.table), p.ids,
                  reinterpret_cast<uint16_t*>(p.out)};
  constexpr int kBlockElements = kThreads * kVectorElements;
  const dim3 grid(static_cast<unsigned>(p.m),
                  static_cast<unsigned>((p.dim + kBlockElements - 1) / kBlockElements));
  const bool aligned =
      VectorsAreAligned(p.table, p.dim, p.dim) && VectorsAreAligned(p.out, p.dim, p.dim);
  const auto kernel = aligned ? Embedding<true> : Embedding<false>;
  return LaunchDependent(kOp, kernel, grid, kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
