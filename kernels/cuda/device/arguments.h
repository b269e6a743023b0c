#pragma once

// Refusing arguments by name: what every Launch... function of kernels/cuda checks before it
// launches. `op` and `field` are as the caller wrote them: "RmsNorm: dim is 0". Any thread.

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace moebius::kernels::cuda {

// INVALID_ARGUMENT unless low <= value <= high.
absl::Status CheckRange(absl::string_view op, absl::string_view field, int64_t value, int64_t low,
                        int64_t high);

// INVALID_ARGUMENT if the pointer is null or not a multiple of `alignment` bytes.
absl::Status CheckPointer(absl::string_view op, absl::string_view field, const void* pointer,
                          uintptr_t alignment);

// INVALID_ARGUMENT "op: what": for what one field alone does not show.
absl::Status Refuse(absl::string_view op, absl::string_view what);

}  // namespace moebius::kernels::cuda
