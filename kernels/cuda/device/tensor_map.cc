#include "kernels/cuda/device/tensor_map.h"

#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/status.h"

namespace moebius::kernels::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's entry point, looked up so that programs link and start without a driver.
absl::StatusOr<EncodeTiled> FindEncodeTiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  RETURN_IF_ERROR(ToStatus(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                            12000, cudaEnableDefault, &found),
                           "cuTensorMapEncodeTiled"));
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    return absl::UnavailableError("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace

absl::StatusOr<CUtensorMap> EncodeMatrixMap(const MatrixMap& matrix) {
  static const absl::StatusOr<EncodeTiled> encode = FindEncodeTiled();
  if (!encode.ok()) return encode.status();
  const CUtensorMapDataType type = matrix.element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : matrix.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  CUtensorMap map;
  const cuuint64_t sizes[2] = {matrix.cols, matrix.rows};
  const cuuint64_t strides[1] = {matrix.row_stride_bytes};
  const cuuint32_t box[2] = {matrix.box_cols, matrix.box_rows};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result = (*encode)(
      &map, type, 2, const_cast<void*>(matrix.base), sizes, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      matrix.swizzle_128b ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      matrix.l2_promotion ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor map of ", matrix.rows, " x ", matrix.cols, " elements of ", matrix.element_bytes,
        " bytes, row stride ", matrix.row_stride_bytes, ", box ", matrix.box_rows, " x ",
        matrix.box_cols, ": driver error ", static_cast<int>(result)));
  }
  return map;
}

}  // namespace moebius::kernels::cuda
