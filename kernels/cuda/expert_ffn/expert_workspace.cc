#include "kernels/cuda/expert_ffn/expert_workspace.h"

#include <cuda_runtime.h>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/expert_ffn/tile_shape.h"

namespace moebius::kernels::cuda {

absl::StatusOr<ExpertWorkspace> ExpertWorkspace::Create(int64_t rows_max, int64_t intermediate,
                                                        int64_t experts_max) {
  constexpr char kOp[] = "ExpertWorkspace";
  RETURN_IF_ERROR(CheckRange(kOp, "rows_max", rows_max, 1, 1 << 24));
  RETURN_IF_ERROR(CheckRange(kOp, "intermediate", intermediate, 16, 1 << 20));
  RETURN_IF_ERROR(CheckRange(kOp, "experts_max", experts_max, 1, kMostExperts));
  ExpertWorkspace space(rows_max, intermediate, experts_max);
  const auto bytes = static_cast<size_t>(rows_max * intermediate);
  RETURN_IF_ERROR(ToStatus(cudaMalloc(reinterpret_cast<void**>(&space.codes_), bytes), kOp));
  const auto scales = static_cast<size_t>(rows_max * ((intermediate + kTileK - 1) / kTileK)) * 4;
  RETURN_IF_ERROR(ToStatus(cudaMalloc(reinterpret_cast<void**>(&space.scales_), scales), kOp));
  // Every expert may leave one tile of rows unfilled.
  const size_t counters =
      4 * static_cast<size_t>(kCounterTiles + rows_max / kTileRows + experts_max);
  RETURN_IF_ERROR(ToStatus(cudaMalloc(reinterpret_cast<void**>(&space.counters_), counters), kOp));
  RETURN_IF_ERROR(ToStatus(cudaMemset(space.counters_, 0, counters), kOp));
  RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(nullptr), kOp));  // any stream may come next
  return space;
}

ExpertWorkspace::ExpertWorkspace(ExpertWorkspace&& other) noexcept
    : rows_max_(other.rows_max_),
      intermediate_(other.intermediate_),
      experts_max_(other.experts_max_),
      codes_(other.codes_),
      scales_(other.scales_),
      counters_(other.counters_) {
  other.codes_ = nullptr;
  other.scales_ = nullptr;
  other.counters_ = nullptr;
}

ExpertWorkspace::~ExpertWorkspace() {
  cudaFree(codes_);
  cudaFree(scales_);
  cudaFree(counters_);
}

}  // namespace moebius::kernels::cuda
