#include "kernels/cuda/device/status.h"

#include <atomic>

#include "absl/strings/str_cat.h"

namespace moebius::kernels::cuda {

absl::Status ToStatus(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message =
      absl::StrCat(what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  return error == cudaErrorMemoryAllocation ? absl::ResourceExhaustedError(message)
                                            : absl::InternalError(message);
}

int MultiprocessorCount() {
  static std::atomic<int> known = 0;
  if (const int count = known.load(std::memory_order_relaxed); count > 0) return count;
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 132;
  }
  known.store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace moebius::kernels::cuda
