#include "kernels/cuda/expert_ffn/expert_table.h"

#include <cuda_runtime.h>

#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/expert_ffn/tile_shape.h"

namespace moebius::kernels::cuda {
namespace {

absl::StatusOr<CUtensorMap> MapOf(const E4m3* matrix, int64_t rows, int64_t cols) {
  MatrixMap map;
  map.base = matrix;
  map.rows = static_cast<uint64_t>(rows);
  map.cols = map.row_stride_bytes = static_cast<uint64_t>(cols);
  map.box_rows = kTileColumns;
  map.box_cols = kTileK;
  return EncodeMatrixMap(map);
}

absl::StatusOr<ExpertEntry> EntryOf(const std::string& op, const ExpertMatrices& e, int64_t hidden,
                                    int64_t intermediate) {
  RETURN_IF_ERROR(CheckPointer(op, "gate_proj", e.gate_proj, 16));
  RETURN_IF_ERROR(CheckPointer(op, "up_proj", e.up_proj, 16));
  RETURN_IF_ERROR(CheckPointer(op, "down_proj", e.down_proj, 16));
  RETURN_IF_ERROR(CheckPointer(op, "gate_scales", e.gate_scales, 4));
  RETURN_IF_ERROR(CheckPointer(op, "up_scales", e.up_scales, 4));
  RETURN_IF_ERROR(CheckPointer(op, "down_scales", e.down_scales, 4));
  ExpertEntry entry = {};
  ASSIGN_OR_RETURN(entry.gate, MapOf(e.gate_proj, intermediate, hidden));
  ASSIGN_OR_RETURN(entry.up, MapOf(e.up_proj, intermediate, hidden));
  ASSIGN_OR_RETURN(entry.down, MapOf(e.down_proj, hidden, intermediate));
  entry.gate_scales = e.gate_scales;
  entry.up_scales = e.up_scales;
  entry.down_scales = e.down_scales;
  return entry;
}

}  // namespace

absl::StatusOr<ExpertTable> ExpertTable::Create(int64_t hidden, int64_t intermediate,
                                                absl::Span<const ExpertMatrices> experts) {
  constexpr char kOp[] = "ExpertTable";
  constexpr int64_t kMost = 1 << 20;
  RETURN_IF_ERROR(CheckRange(kOp, "hidden", hidden, 16, kMost));
  RETURN_IF_ERROR(CheckRange(kOp, "intermediate", intermediate, 16, kMost));
  RETURN_IF_ERROR(CheckRange(kOp, "hidden % 16", hidden % 16, 0, 0));
  RETURN_IF_ERROR(CheckRange(kOp, "intermediate % 16", intermediate % 16, 0, 0));
  std::vector<ExpertEntry> entries;
  for (size_t i = 0; i < experts.size(); ++i) {
    ASSIGN_OR_RETURN(ExpertEntry entry,
                     EntryOf(absl::StrCat(kOp, ": expert ", i), experts[i], hidden, intermediate));
    entries.push_back(entry);
  }
  ExpertTable table(hidden, intermediate, static_cast<int64_t>(experts.size()));
  if (entries.empty()) return table;
  const size_t bytes = entries.size() * sizeof(ExpertEntry);
  RETURN_IF_ERROR(ToStatus(cudaMalloc(reinterpret_cast<void**>(&table.entries_), bytes), kOp));
  RETURN_IF_ERROR(
      ToStatus(cudaMemcpy(table.entries_, entries.data(), bytes, cudaMemcpyHostToDevice), kOp));
  // The copy may still be under way, and a stream that doesn't wait for it may come next.
  RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(nullptr), kOp));
  return table;
}

ExpertTable::ExpertTable(ExpertTable&& other) noexcept
    : hidden_(other.hidden_),
      intermediate_(other.intermediate_),
      size_(other.size_),
      entries_(other.entries_) {
  other.entries_ = nullptr;
}

ExpertTable::~ExpertTable() { cudaFree(entries_); }

}  // namespace moebius::kernels::cuda
