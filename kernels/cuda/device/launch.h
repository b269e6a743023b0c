#pragma once

// One launch with all that kernels here ask of one: clusters, more dynamic shared memory than the
// default limit, and leave to start before the kernel in front has ended.

#include <cuda_runtime.h>

#include <cstddef>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/status.h"

namespace moebius::kernels::cuda {

struct LaunchShape {
  dim3 grid;  // CTAs, in multiples of the cluster
  dim3 cluster = dim3(1, 1, 1);
  unsigned threads = 0;
  int shared_bytes = 0;  // dynamic
  // The kernel keeps the contract of kernels/cuda/device/dependent_launch.cuh.
  bool overlaps = false;
};

// Lets `kernel` take all the dynamic shared memory that its static memory leaves. Always the same
// limit: threads that launch one kernel with different amounts cannot take it from each other.
inline absl::Status AllowSharedMemory(absl::string_view name, const void* kernel) {
  constexpr int kMostOfACta = 227 * 1024;  // compute capability 9.0
  cudaFuncAttributes attributes;
  RETURN_IF_ERROR(ToStatus(cudaFuncGetAttributes(&attributes, kernel), name));
  const int most = kMostOfACta - static_cast<int>(attributes.sharedSizeBytes);
  if (attributes.maxDynamicSharedSizeBytes == most) return absl::OkStatus();
  return ToStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
                  name);
}

// Enqueues `kernel`. INTERNAL, with `name`, if the driver refuses.
template <typename... Params>
absl::Status Launch(absl::string_view name, void (*kernel)(Params...), const LaunchShape& shape,
                    cudaStream_t stream, const Params&... params) {
  if (shape.shared_bytes > 0) {
    RETURN_IF_ERROR(AllowSharedMemory(name, reinterpret_cast<const void*>(kernel)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.overlaps) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster.x * shape.cluster.y * shape.cluster.z > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  }
  return ToStatus(cudaLaunchKernelEx(&config, kernel, params...), name);
}

}  // namespace moebius::kernels::cuda
