#include "kernels/cuda/residual/residual.h"

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/row_vector.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "Residual";
constexpr int kThreads = 128;

struct Args {
  int64_t count;
  uint16_t* h;
  const uint16_t* y;
  const uint16_t* shared;
};

// Rows are dense, so they are one row of m * dim elements; a block adds 1,024 of them.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) Residual(const Args args) {
  LetNextKernelStart();
  WaitForPrecedingKernel();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads * kVectorElements;
  const int left = static_cast<int>(min(args.count - begin, int64_t{kThreads * kVectorElements}));
  const int at = static_cast<int>(threadIdx.x) * kVectorElements;
  const RowVector h = LoadVector<kAligned>(args.h + begin, at, left);
  RowVector y = LoadVector<kAligned>(args.y + begin, at, left);
  if (args.shared != nullptr) {
    y = AddVectors(y, LoadVector<kAligned>(args.shared + begin, at, left));
  }
  StoreVector<kAligned>(AddVectors(h, y), args.h + begin, at, left);
}

}  // namespace

absl::Status LaunchResidual(const ResidualParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "dim", p.dim, 1, 1 << 20));
  RETURN_IF_ERROR(CheckPointer(kOp, "h", p.h, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "y", p.y, 2));
  const Args args{p.m * p.dim, reinterpret_cast<uint16_t*>(p.h),
                  reinterpret_cast<const uint16_t*>(p.y),
                  reinterpret_cast<const uint16_t*>(p.shared)};
  constexpr int64_t kBlockElements = kThreads * kVectorElements;
  const int64_t blocks = (args.count + kBlockElements - 1) / kBlockElements;
  RETURN_IF_ERROR(CheckRange(kOp, "m * dim / 1024", blocks, 1, INT32_MAX));
  const bool aligned = VectorsAreAligned(p.h, 8, args.count) && VectorsAreAligned(p.y, 8, 8) &&
                       VectorsAreAligned(p.shared, 8, 8);
  const auto kernel = aligned ? Residual<true> : Residual<false>;
  return LaunchDependent(kOp, kernel, dim3(static_cast<unsigned>(blocks)), kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
