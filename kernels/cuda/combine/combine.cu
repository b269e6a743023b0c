#include "kernels/cuda/combine/combine.h"

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/canonical_sum.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "Combine";
constexpr int kThreads = 128;
static_assert(sizeof(ExpertId) == sizeof(uint32_t), "experts are read as their numbers");
static_assert(kCombineMaxTopK == kCanonicalSumMaxTopK);

struct Args {
  ExpertRows in;
  int dim;
  uint16_t* out;
  const uint16_t* shared;
  uint16_t* h;
  bool few_blocks;
};

// Block (token, i) sums 1,024 neighbouring elements, 8 a thread.
template <bool kAligned, bool kWhole, bool kResidual>
__global__ void __launch_bounds__(kThreads, !kAligned   ? 1
                                            : kResidual ? 7
                                                        : 8) Combine(const Args args) {
  WaitForPrecedingKernel();
  const int64_t token = blockIdx.x;
  const int64_t dense = token * args.dim;
  const int at = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kVectorElements;
  RowVector shared, h;
  if constexpr (kResidual) {
    shared = LoadVector<kAligned>(args.shared + dense, at, args.dim);
    h = LoadVector<kAligned>(args.h + dense, at, args.dim);
  }
  // Few blocks leave room for the next kernel's on every multiprocessor. Where there are many, its
  // blocks would crowd on those that come free first.
  const auto loads_issued = [&] {
    if (args.few_blocks) LetNextKernelStart();
  };
  const RowVector routed =
      CanonicalSum<kAligned, kWhole>(args.in, token, at, args.dim, loads_issued);
  if (!args.few_blocks) LetNextKernelStartAfter(routed.pair[0]);
  if (args.out != nullptr) StoreVector<kAligned>(routed, args.out + dense, at, args.dim);
  if constexpr (kResidual) {
    StoreVector<kAligned>(AddVectors(h, AddVectors(routed, shared)), args.h + dense, at, args.dim);
  }
}

template <bool kResidual>
auto Select(bool aligned, bool whole) {
  if (!aligned) return Combine<false, false, kResidual>;
  return whole ? Combine<true, true, kResidual> : Combine<true, false, kResidual>;
}

absl::Status Validate(const CombineParams& p) {
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "dim", p.dim, 1, 1 << 20));
  RETURN_IF_ERROR(CheckRange(kOp, "top_k", p.top_k, 1, kCombineMaxTopK));
  RETURN_IF_ERROR(CheckRange(kOp, "experts_per_group", p.experts_per_group, 1, INT32_MAX));
  RETURN_IF_ERROR(CheckPointer(kOp, "experts", p.experts, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "weights", p.weights, 4));
  if (p.rows != nullptr) {
    if (p.buffer != nullptr || p.row_index != nullptr) {
      return Refuse(kOp, "both rows and buffer or row_index are set");
    }
    RETURN_IF_ERROR(CheckPointer(kOp, "rows", p.rows, 8));
  } else {
    RETURN_IF_ERROR(CheckPointer(kOp, "buffer", p.buffer, 2));
    RETURN_IF_ERROR(CheckPointer(kOp, "row_index", p.row_index, 4));
  }
  if ((p.shared == nullptr) != (p.h == nullptr)) return Refuse(kOp, "one of shared and h is null");
  if (p.out == nullptr && p.shared == nullptr) return Refuse(kOp, "out is null");
  return absl::OkStatus();
}

// Of L2, for rows that nobody reads again. Times chose it (docs/kernels-cuda.md): a row or two take
// no room worth keeping, and a long stream of rows is a little slower with the hint.
uint64_t RowsPolicy(int64_t tokens) {
  return tokens >= 4 && tokens <= 256 ? kEvictFirst : kEvictNormal;
}

ExpertRows ToExpertRows(const CombineParams& p) {
  return {p.top_k,
          static_cast<uint32_t>(p.experts_per_group),
          reinterpret_cast<const uint32_t*>(p.experts),
          p.weights,
          reinterpret_cast<const uint16_t*>(p.buffer),
          p.row_index,
          reinterpret_cast<const uint16_t* const*>(p.rows),
          RowsPolicy(p.m)};
}

bool Aligned(const CombineParams& p) {
  for (const void* rows : {static_cast<const void*>(p.buffer), static_cast<const void*>(p.out),
                           static_cast<const void*>(p.shared), static_cast<const void*>(p.h)}) {
    if (!VectorsAreAligned(rows, p.dim, p.dim)) return false;
  }
  return true;
}

}  // namespace

absl::Status LaunchCombine(const CombineParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const bool aligned = Aligned(p);
  constexpr int kBlockElements = kThreads * kVectorElements;
  const dim3 grid(static_cast<unsigned>(p.m),
                  static_cast<unsigned>((p.dim + kBlockElements - 1) / kBlockElements));
  const Args args{ToExpertRows(p),
                  static_cast<int>(p.dim),
                  reinterpret_cast<uint16_t*>(p.out),
                  reinterpret_cast<const uint16_t*>(p.shared),
                  reinterpret_cast<uint16_t*>(p.h),
                  p.m * grid.y <= MultiprocessorCount()};
  const bool whole = p.top_k % kCanonicalRowsInFlight == 0;
  const auto kernel =
      p.shared != nullptr ? Select<true>(aligned, whole) : Select<false>(aligned, whole);
  return LaunchDependent(kOp, kernel, grid, kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
