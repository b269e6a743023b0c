#include "kernels/cuda/swiglu/swiglu.h"

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/exp.cuh"
#include "kernels/cuda/device/quantizer.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "SwiGlu";
constexpr int kThreads = 128;

struct Args {
  int dim;
  const uint16_t* gate;
  const uint16_t* up;
  int64_t in_stride;
  uint16_t* out;
  uint8_t* codes;
  float* scales;
  bool power_of_two;
};

// Block (row, i) computes 1,024 neighbouring elements, 8 a thread.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) SwiGlu(const Args args) {
  WaitForPrecedingKernel();
  const int64_t row = blockIdx.x;
  const int at = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kVectorElements;
  const RowVector gate = LoadVector<kAligned>(args.gate + row * args.in_stride, at, args.dim);
  const RowVector up = LoadVector<kAligned>(args.up + row * args.in_stride, at, args.dim);
  // Past the row's end gate and up are 0, and so is the product.
  const RowVector out = RoundedVector([&](int i) { return __fmul_rn(Silu(gate.At(i)), up.At(i)); });
  LetNextKernelStart();
  if (args.out != nullptr) StoreVector<kAligned>(out, args.out + row * args.dim, at, args.dim);
  if (args.codes != nullptr) {
    QuantizeVector<kAligned>(out, at, args.dim, args.power_of_two, args.codes + row * args.dim,
                             args.scales + row * ((args.dim + 127) / 128));
  }
}

absl::Status Validate(const SwiGluParams& p) {
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange(kOp, "dim", p.dim, 1, 1 << 20));
  RETURN_IF_ERROR(CheckRange(kOp, "in_stride", p.in_stride, p.dim, INT64_MAX));
  RETURN_IF_ERROR(CheckPointer(kOp, "gate", p.gate, 2));
  RETURN_IF_ERROR(CheckPointer(kOp, "up", p.up, 2));
  if (p.out == nullptr && p.codes == nullptr) return Refuse(kOp, "neither out nor codes is set");
  if (p.codes != nullptr) RETURN_IF_ERROR(CheckPointer(kOp, "scales", p.scales, 4));
  return absl::OkStatus();
}

}  // namespace

absl::Status LaunchSwiGlu(const SwiGluParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const Args args{static_cast<int>(p.dim),
                  reinterpret_cast<const uint16_t*>(p.gate),
                  reinterpret_cast<const uint16_t*>(p.up),
                  p.in_stride,
                  reinterpret_cast<uint16_t*>(p.out),
                  reinterpret_cast<uint8_t*>(p.codes),
                  p.scales,
                  p.power_of_two_scales};
  const bool aligned = VectorsAreAligned(p.gate, p.in_stride, p.dim) &&
                       VectorsAreAligned(p.up, p.in_stride, p.dim) &&
                       VectorsAreAligned(p.out, p.dim, p.dim) &&
                       CodesAreAligned(p.codes, p.dim, p.dim);
  constexpr int kBlockElements = kThreads * kVectorElements;
  const dim3 grid(static_cast<unsigned>(p.m),
                  static_cast<unsigned>((p.dim + kBlockElements - 1) / kBlockElements));
  const auto kernel = aligned ? SwiGlu<true> : SwiGlu<false>;
  return LaunchDependent(kOp, kernel, grid, kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
