#include "kernels/cuda/quantize_rows/quantize_rows.h"

#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/quantizer.cuh"

namespace moebius::kernels::cuda {
namespace {

// A thread quantises one vector (of several rows); a block takes 1,024 neighbouring elements.
constexpr int kThreads = 128;
constexpr int kBlockElements = kThreads * kVectorElements;
constexpr int kCopiesAtOnce = 8;
constexpr int64_t kMaxDim = int64_t{1} << 20;
constexpr unsigned kGridRows = 65535;  // the most that a grid's y may be

struct Rows {
  int m, dim;
  const uint16_t* x;
  int64_t x_stride;
  bool power_of_two;
};

struct QuantizeArgs {
  Rows rows;
  const int32_t* row_index;
  uint8_t* codes;
  float* scales;
};

struct DispatchArgs {
  Rows rows;
  const int32_t* copy_begin;
  const RowCopy* copies;
};

// kRows rows a thread, their loads in flight together.
template <int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads) QuantizeRows(const QuantizeArgs args) {
  WaitForPrecedingKernel();
  const Rows& rows = args.rows;
  const int first = static_cast<int>(blockIdx.x) * kRows;
  const int at = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kVectorElements;
  const int64_t blocks = (rows.dim + 127) / 128;
  RowVector x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= rows.m) continue;
    const int64_t source = args.row_index == nullptr ? first + r : args.row_index[first + r];
    x[r] = LoadVector<kAligned>(rows.x + source * rows.x_stride, at, rows.dim);
  }
  LetNextKernelStart();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= rows.m) continue;
    const int64_t row = first + r;
    QuantizeVector<kAligned>(x[r], at, rows.dim, rows.power_of_two, args.codes + row * rows.dim,
                             args.scales + row * blocks);
  }
}

// Codes [at, at + 16) of a row, as two vectors or one by one.
__device__ __forceinline__ void StorePair(uint4 codes, uint8_t* row, int at, int dim,
                                          bool by_vector) {
  const uint2 low = make_uint2(codes.x, codes.y), high = make_uint2(codes.z, codes.w);
  if (by_vector) {
    StoreCodes<true>(low, row, at, dim);
    StoreCodes<true>(high, row, at + kVectorElements, dim);
  } else {
    StoreCodes<false>(low, row, at, dim);
    StoreCodes<false>(high, row, at + kVectorElements, dim);
  }
}

// Two neighbouring lanes share their codes: the even one writes both vectors to every other place,
// the odd one to the rest, 16 bytes at a time. Of the 16 lanes that hold a block, the first eight
// write its scale to a place each.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 12 : 1)
    DispatchRows(const DispatchArgs args) {
  const Rows& rows = args.rows;
  // Blocks of a row are neighbours, so that it is written in one go: DRAM likes long stretches.
  const int64_t row = blockIdx.z * kGridRows + blockIdx.y;
  if (row >= rows.m) return;
  const int at = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * kVectorElements;
  const int odd = static_cast<int>(threadIdx.x % 2);
  const int block_lane = static_cast<int>(threadIdx.x % kBlockLanes);
  const uint16_t* const x_row = rows.x + row * rows.x_stride;
  const int32_t* const copy_begin = args.copy_begin + row;
  WaitForPrecedingKernel();
  const RowVector x = LoadVector<kAligned>(x_row, at, rows.dim);
  const int begin = copy_begin[0], end = copy_begin[1];
  if (begin == end) return;
  // The first places are read while the row is on its way; past the last, the last again.
  uint8_t* to[kCopiesAtOnce / 2];
  float* scales_to;
  const auto read_copies = [&](int first) {
#pragma unroll
    for (int i = 0; i < kCopiesAtOnce / 2; ++i) {
      to[i] = reinterpret_cast<uint8_t*>(args.copies[min(first + 2 * i + odd, end - 1)].codes);
    }
    scales_to = args.copies[min(first + block_lane, end - 1)].scales;
  };
  read_copies(begin);
  const BlockScale s = ScaleOfBlock(LargestOfBlock(x), rows.power_of_two);
  const uint2 mine = CodesOfVector(x, s);
  const uint2 other =
      make_uint2(__shfl_xor_sync(0xffffffffu, mine.x, 1), __shfl_xor_sync(0xffffffffu, mine.y, 1));
  const uint4 codes = odd == 0 ? make_uint4(mine.x, mine.y, other.x, other.y)
                               : make_uint4(other.x, other.y, mine.x, mine.y);
  const int pair_at = at - odd * kVectorElements, scale_at = at / 128;
  const bool writes_scale = block_lane < kCopiesAtOnce && scale_at * 128 < rows.dim;
  LetNextKernelStart();
  for (int first = begin;;) {
    uintptr_t places = static_cast<uintptr_t>(rows.dim);
#pragma unroll
    for (int i = 0; i < kCopiesAtOnce / 2; ++i) places |= reinterpret_cast<uintptr_t>(to[i]);
    if (kAligned && places % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kCopiesAtOnce / 2; ++i) {
        if (first + 2 * i + odd < end && pair_at < rows.dim)
          *reinterpret_cast<uint4*>(to[i] + pair_at) = codes;
      }
    } else {
      const bool by_vector = kAligned && places % 8 == 0;
#pragma unroll
      for (int i = 0; i < kCopiesAtOnce / 2; ++i) {
        if (first + 2 * i + odd < end) StorePair(codes, to[i], pair_at, rows.dim, by_vector);
      }
    }
    if (writes_scale && first + block_lane < end) scales_to[scale_at] = s.scale;
    first += kCopiesAtOnce;
    if (first >= end) break;
    read_copies(first);
  }
}

absl::Status Validate(const char* op, int64_t m, int64_t dim, const void* x, int64_t x_stride) {
  RETURN_IF_ERROR(CheckRange(op, "m", m, 0, INT32_MAX - 8));
  RETURN_IF_ERROR(CheckRange(op, "dim", dim, 1, kMaxDim));
  RETURN_IF_ERROR(CheckRange(op, "x_stride", x_stride, dim, INT64_MAX));
  return CheckPointer(op, "x", x, 2);
}

Rows MakeRows(int64_t m, int64_t dim, const Bf16* x, int64_t x_stride, bool power_of_two) {
  return {static_cast<int>(m), static_cast<int>(dim), reinterpret_cast<const uint16_t*>(x),
          x_stride, power_of_two};
}

dim3 Grid(int64_t m, int rows_per_block, int64_t dim) {
  return dim3(static_cast<unsigned>((m + rows_per_block - 1) / rows_per_block),
              static_cast<unsigned>((dim + kBlockElements - 1) / kBlockElements));
}

}  // namespace

absl::Status LaunchQuantizeRows(const QuantizeRowsParams& p, cudaStream_t stream) {
  constexpr char kOp[] = "QuantizeRows";
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(kOp, p.m, p.dim, p.x, p.x_stride));
  RETURN_IF_ERROR(CheckPointer(kOp, "codes", p.codes, 1));
  RETURN_IF_ERROR(CheckPointer(kOp, "scales", p.scales, 4));
  const QuantizeArgs args{MakeRows(p.m, p.dim, p.x, p.x_stride, p.power_of_two_scales), p.row_index,
                          reinterpret_cast<uint8_t*>(p.codes), p.scales};
  const bool aligned =
      VectorsAreAligned(p.x, p.x_stride, p.dim) && CodesAreAligned(p.codes, p.dim, p.dim);
  if (!aligned) {
    return LaunchDependent(kOp, QuantizeRows<1, false>, Grid(p.m, 1, p.dim), kThreads, stream,
                           args);
  }
  // Few rows: as many threads as there are vectors. Many: fewer, with more in flight each.
  if (p.m * p.dim <= int64_t{1} << 21) {
    return LaunchDependent(kOp, QuantizeRows<1, true>, Grid(p.m, 1, p.dim), kThreads, stream, args);
  }
  return LaunchDependent(kOp, QuantizeRows<2, true>, Grid(p.m, 2, p.dim), kThreads, stream, args);
}

absl::Status LaunchDispatchRows(const DispatchRowsParams& p, cudaStream_t stream) {
  constexpr char kOp[] = "DispatchRows";
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(kOp, p.m, p.dim, p.x, p.x_stride));
  RETURN_IF_ERROR(CheckPointer(kOp, "copy_begin", p.copy_begin, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "copies", p.copies, 16));
  const DispatchArgs args{MakeRows(p.m, p.dim, p.x, p.x_stride, p.power_of_two_scales),
                          p.copy_begin, p.copies};
  const auto kernel =
      VectorsAreAligned(p.x, p.x_stride, p.dim) ? DispatchRows<true> : DispatchRows<false>;
  const auto rows = static_cast<unsigned>(p.m);
  const dim3 grid(static_cast<unsigned>((p.dim + kBlockElements - 1) / kBlockElements),
                  std::min(rows, kGridRows), (rows + kGridRows - 1) / kGridRows);
  return LaunchDependent(kOp, kernel, grid, kThreads, stream, args);
}

}  // namespace moebius::kernels::cuda
