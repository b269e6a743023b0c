#include "kernels/cuda/combine/combine.h"

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/row_vector.cuh"

namespace moebius::kernels::cuda {
namespace {

constexpr char kOp[] = "Combine";
constexpr int kThreads = 128;
constexpr int kRowsInFlight = 8;
static_assert(sizeof(ExpertId) == sizeof(uint32_t), "experts are read as their numbers");

struct Args {
  int dim, top_k;
  uint32_t experts_per_group;
  const uint32_t* experts;
  const float* weights;
  const uint16_t* buffer;
  const int32_t* row_index;
  const uint16_t* const* rows;
  uint16_t* out;
  const uint16_t* shared;
  uint16_t* h;
};

// Bit j: slot j is the first of its group. All lanes of the warp take part.
__device__ __forceinline__ uint64_t GroupStarts(const Args& args, const uint32_t* experts) {
  uint64_t starts = 0;
#pragma unroll
  for (int half = 0; half < kCombineMaxTopK / 32; ++half) {
    if (32 * half >= args.top_k) break;
    const int slot = 32 * half + static_cast<int>(threadIdx.x % 32);
    bool first = false;
    if (slot < args.top_k) {
      first = slot == 0 ||
              experts[slot] / args.experts_per_group != experts[slot - 1] / args.experts_per_group;
    }
    starts |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, first)) << (32 * half);
  }
  return starts;
}

// Block (token, i) sums 1,024 neighbouring elements, 8 a thread.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 7 : 1) Combine(const Args args) {
  LetNextKernelStart();
  WaitForPrecedingKernel();
  const int64_t token = blockIdx.x;
  const int at = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kVectorElements;
  const int64_t slots = token * args.top_k;
  const uint64_t starts = GroupStarts(args, args.experts + slots);

  float chain[kVectorElements], total[kVectorElements];
#pragma unroll
  for (int i = 0; i < kVectorElements; ++i) chain[i] = total[i] = 0.0f;
  const auto end_group = [&] {
    const RowVector rounded = RoundedVector([&](int i) { return chain[i]; });
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) total[i] = __fadd_rn(total[i], rounded.At(i));
  };
  RowVector shared, h;
  if (args.shared != nullptr) {
    shared = LoadVector<kAligned>(args.shared + token * args.dim, at, args.dim);
    h = LoadVector<kAligned>(args.h + token * args.dim, at, args.dim);
  }
  for (int first = 0; first < args.top_k; first += kRowsInFlight) {
    RowVector x[kRowsInFlight];
    float weight[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (first + j >= args.top_k) continue;
      const int64_t slot = slots + first + j;
      const uint16_t* const row =
          args.rows != nullptr
              ? args.rows[slot]
              : args.buffer + static_cast<int64_t>(args.row_index[slot]) * args.dim;
      x[j] = LoadVector<kAligned>(row, at, args.dim);
      weight[j] = args.weights[slot];
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (first + j >= args.top_k) continue;
      if (starts >> (first + j) & 1) {
        if (first + j > 0) end_group();
#pragma unroll
        for (int i = 0; i < kVectorElements; ++i) chain[i] = __fmul_rn(weight[j], x[j].At(i));
      } else {
#pragma unroll
        for (int i = 0; i < kVectorElements; ++i)
          chain[i] = __fmaf_rn(weight[j], x[j].At(i), chain[i]);
      }
    }
  }
  end_group();
  const RowVector routed = RoundedVector([&](int i) { return total[i]; });
  if (args.out != nullptr) StoreVector<kAligned>(routed, args.out + token * args.dim, at, args.dim);
  if (args.shared != nullptr) {
    StoreVector<kAligned>(AddVectors(h, AddVectors(routed, shared)), args.h + token * args.dim, at,
                          args.dim);
  }
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

}  // namespace

absl::Status LaunchCombine(const CombineParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  Args args;
  args.dim = static_cast<int>(p.dim);
  args.top_k = p.top_k;
  args.experts_per_group = static_cast<uint32_t>(p.experts_per_group);
  args.experts = reinterpret_cast<const uint32_t*>(p.experts);
  args.weights = p.weights;
  args.buffer = reinterpret_cast<const uint16_t*>(p.buffer);
  args.row_index = p.row_index;
  args.rows = reinterpret_cast<const uint16_t* const*>(p.rows);
  args.out = reinterpret_cast<uint16_t*>(p.out);
  args.shared = reinterpret_cast<const uint16_t*>(p.shared);
  args.h = reinterpret_cast<uint16_t*>(p.h);
  bool aligned = true;
  for (const void* rows : {static_cast<const void*>(p.buffer), static_cast<const void*>(p.out),
                           static_cast<const void*>(p.shared), static_cast<const void*>(p.h)}) {
    aligned = aligned && VectorsAreAligned(rows, p.dim, p.dim);
  }
  constexpr int kBlockElements = kThreads * kVectorElements;
  const dim3 grid(static_cast<unsigned>(p.m),
                  static_cast<unsigned>((p.dim + kBlockElements - 1) / kBlockElements));
  const auto kernel = aligned ? Combine<true> : Combine<false>;
  return LaunchDependent(kOp, kernel, grid, kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
