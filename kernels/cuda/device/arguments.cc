#include "kernels/cuda/device/arguments.h"

#include "absl/strings/str_cat.h"

namespace moebius::kernels::cuda {

absl::Status CheckRange(absl::string_view op, absl::string_view field, int64_t value, int64_t low,
                        int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": ", field, " is ", value, ", expected ", low, " to ", high));
}

absl::Status CheckPointer(absl::string_view op, absl::string_view field, const void* pointer,
                          uintptr_t alignment) {
  if (pointer == nullptr)
    return absl::InvalidArgumentError(absl::StrCat(op, ": ", field, " is null"));
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": ", field, " is not aligned to ", alignment, " bytes"));
}

absl::Status Refuse(absl::string_view op, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(op, ": ", what));
}

}  // namespace moebius::kernels::cuda
