#include "kernels/cuda/fp8_linear/fp8_linear.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/fp8_linear/paths.h"

namespace moebius::kernels::cuda {
namespace {

absl::Status Validate(const Fp8LinearParams& p) {
  constexpr const char* kOp = "Fp8Linear";
  constexpr int64_t kMost = int64_t{1} << 22;  // rows: fewer than 65,536 tiles of 128
  RETURN_IF_ERROR(CheckRange(kOp, "m", p.m, 0, kMost));
  RETURN_IF_ERROR(CheckRange(kOp, "n", p.n, 1, kMost));
  RETURN_IF_ERROR(CheckRange(kOp, "k", p.k, 1, kMost));
  if (p.k % 16 != 0) return Refuse(kOp, absl::StrCat("k is ", p.k, ", not a multiple of 16"));
  RETURN_IF_ERROR(CheckRange(kOp, "out_stride", p.out_stride, p.n, INT64_MAX / kMost));
  RETURN_IF_ERROR(CheckPointer(kOp, "x", p.x, 16));
  RETURN_IF_ERROR(CheckPointer(kOp, "weight", p.weight, 16));
  RETURN_IF_ERROR(CheckPointer(kOp, "x_scales", p.x_scales, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "weight_scales", p.weight_scales, 4));
  RETURN_IF_ERROR(CheckPointer(kOp, "out", p.out, 2));
  return absl::OkStatus();
}

}  // namespace

int Fp8LinearSegments(int64_t n, int64_t k) {
  // The numbers are part of the arithmetic, whatever card it runs on: they were chosen for 132
  // multiprocessors (docs/adr/0014).
  const int64_t tiles = (n + 63) / 64, blocks = (k + kFp8Block - 1) / kFp8Block;
  if (blocks < 16) return 1;
  if (tiles <= 15) return 8;
  if (tiles <= 44) return 3;
  if (tiles <= 66) return 2;
  return tiles <= 132 && blocks >= 64 ? 3 : 1;
}

absl::Status LaunchFp8Linear(const Fp8LinearParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const int segments = Fp8LinearSegments(p.n, p.k);
  // Large tiles once they occupy half of the card.
  const int64_t large_tiles = (p.m + 127) / 128 * ((p.n + 127) / 128);
  const bool large = p.m > 64 && 2 * large_tiles >= MultiprocessorCount() && Fp8LinearLargeTakes(p);
  return large ? LaunchFp8LinearLarge(p, segments, stream)
               : LaunchFp8LinearSmall(p, segments, stream);
}

}  // namespace moebius::kernels::cuda
