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

// Enqueues `kernel`. INTERNAL, with `name`, if the driver refuses.
template <typename... Params>
absl::Status Launch(absl::string_view name, void (*kernel)(Params...), const LaunchShape& shape,
                    cudaStream_t stream, const Params&... params) {
  RETURN_IF_ERROR(ToStatus(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
      name));
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = shape.overlaps ? 2 : 1;
  return ToStatus(cudaLaunchKernelEx(&config, kernel, params...), name);
}

}  // namespace moebius::kernels::cuda
