#include "kernels/cuda/expert_ffn/expert_workspace.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/expert_ffn/tile_shape.h"

namespace moebius::kernels::cuda {
namespace {

template <typename T>
absl::Status Allocate(int64_t count, T*& memory) {
  return ToStatus(
      cudaMalloc(reinterpret_cast<void**>(&memory), static_cast<size_t>(count) * sizeof(T)),
      "ExpertWorkspace");
}

int64_t ScalesOf(int64_t rows, int64_t width) { return rows * ((width + kTileK - 1) / kTileK); }

}  // namespace

absl::StatusOr<ExpertWorkspace> ExpertWorkspace::Create(int64_t rows_max, int64_t hidden,
                                                        int64_t intermediate, int64_t experts_max) {
  constexpr char kOp[] = "ExpertWorkspace";
  RETURN_IF_ERROR(CheckRange(kOp, "rows_max", rows_max, 1, 1 << 24));
  RETURN_IF_ERROR(CheckRange(kOp, "hidden", hidden, 16, 1 << 20));
  RETURN_IF_ERROR(CheckRange(kOp, "intermediate", intermediate, 16, 1 << 20));
  RETURN_IF_ERROR(CheckRange(kOp, "experts_max", experts_max, 1, kMostExperts));
  ExpertWorkspace space(rows_max, hidden, intermediate, experts_max);
  RETURN_IF_ERROR(Allocate(rows_max * intermediate, space.codes_));
  RETURN_IF_ERROR(Allocate(ScalesOf(rows_max, intermediate), space.scales_));
  const int64_t gathered_rows = space.gathered_rows_max(), slots = gathered_rows / kTileRows;
  RETURN_IF_ERROR(Allocate(gathered_rows * hidden, space.gathered_codes_));
  RETURN_IF_ERROR(Allocate(ScalesOf(gathered_rows, hidden), space.gathered_scales_));
  // Every expert may leave one tile of rows unfilled.
  const int64_t counters = kCounterTiles + rows_max / kTileRows + experts_max;
  RETURN_IF_ERROR(Allocate(counters + slots * kGatheredWords, space.counters_));
  space.gathered_ = space.counters_ + counters;
  const size_t bytes = static_cast<size_t>(counters + slots * kGatheredWords) * sizeof(int32_t);
  RETURN_IF_ERROR(ToStatus(cudaMemset(space.counters_, 0, bytes), kOp));
  RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(nullptr), kOp));  // any stream may come next
  return space;
}

int64_t ExpertWorkspace::gathered_rows_max() const {
  return std::max<int64_t>(rows_max_ / (kNarrowRows + 1), 1) * kTileRows;
}

ExpertWorkspace::ExpertWorkspace(ExpertWorkspace&& other) noexcept
    : rows_max_(other.rows_max_),
      hidden_(other.hidden_),
      intermediate_(other.intermediate_),
      experts_max_(other.experts_max_),
      codes_(other.codes_),
      scales_(other.scales_),
      counters_(other.counters_),
      gathered_codes_(other.gathered_codes_),
      gathered_scales_(other.gathered_scales_),
      gathered_(other.gathered_) {
  other.codes_ = nullptr;
  other.scales_ = nullptr;
  other.counters_ = nullptr;
  other.gathered_codes_ = nullptr;
  other.gathered_scales_ = nullptr;
  other.gathered_ = nullptr;
}

ExpertWorkspace::~ExpertWorkspace() {
  cudaFree(codes_);
  cudaFree(scales_);
  cudaFree(counters_);
  cudaFree(gathered_codes_);
  cudaFree(gathered_scales_);
}

}  // namespace moebius::kernels::cuda
