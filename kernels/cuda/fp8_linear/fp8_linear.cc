#include "kernels/cuda/fp8_linear/fp8_linear.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/fp8_linear/paths.h"

namespace moebius::kernels::cuda {
namespace {

absl::Status Validate(const Fp8LinearParams& p) {
  const auto bad = [](const char* field, int64_t value) {
    return absl::InvalidArgumentError(absl::StrCat("Fp8Linear: ", field, " is ", value));
  };
  constexpr int64_t kMost = int64_t{1} << 22;  // rows: fewer than 65,536 tiles of 128
  if (p.m < 0 || p.m > kMost) return bad("m", p.m);
  if (p.n <= 0 || p.n > kMost) return bad("n", p.n);
  if (p.k <= 0 || p.k > kMost || p.k % 16 != 0) return bad("k", p.k);
  if (p.out_stride < p.n) return bad("out_stride", p.out_stride);
  for (const void* pointer : {static_cast<const void*>(p.x), static_cast<const void*>(p.weight)}) {
    if (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
      return absl::InvalidArgumentError("Fp8Linear: x or weight is null or not 16-aligned");
    }
  }
  if (p.x_scales == nullptr || p.weight_scales == nullptr || p.out == nullptr) {
    return absl::InvalidArgumentError("Fp8Linear: a scale or output pointer is null");
  }
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
