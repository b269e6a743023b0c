#include "bench/cuda/cublaslt_peer.h"

#include <dlfcn.h>

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#define MOEBIUS_CUBLASLT_HEADER 1
#else
#define MOEBIUS_CUBLASLT_HEADER 0
#endif

namespace moebius::bench {

#if MOEBIUS_CUBLASLT_HEADER
namespace {

struct Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  cublasLtHandle_t handle = nullptr;
  std::string error;
};

Library Load() {
  Library lib;
  void* const so = dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_LOCAL);
  if (so == nullptr) {
    lib.error = "libcublasLt.so.13 is not here";
    return lib;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(so, name));
    if (function == nullptr) lib.error = std::string(name) + " is missing";
  };
  find(lib.create, "cublasLtCreate");
  find(lib.desc_create, "cublasLtMatmulDescCreate");
  find(lib.desc_set, "cublasLtMatmulDescSetAttribute");
  find(lib.layout_create, "cublasLtMatrixLayoutCreate");
  find(lib.preference_create, "cublasLtMatmulPreferenceCreate");
  find(lib.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(lib.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(lib.matmul, "cublasLtMatmul");
  if (lib.error.empty() && lib.create(&lib.handle) != CUBLAS_STATUS_SUCCESS)
    lib.error = "cublasLtCreate failed";
  return lib;
}

}  // namespace

double TimeCublasLtFp8(const CublasLtLinear& l, int launches,
                       const std::function<const E4m3*(int)>& weights, std::string* why) {
  static const Library lib = Load();
  *why = lib.error;
  if (!lib.error.empty()) return -1;
  const auto m = static_cast<uint64_t>((l.m + 3) / 4 * 4);
  const auto n = static_cast<uint64_t>(l.n), k = static_cast<uint64_t>(l.k);
  // Column-major: D [n, m] = A [k, n]^T B [k, m].
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, d;
  cublasLtMatmulPreference_t preference;
  bool ok = lib.desc_create(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS;
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    ok = ok && lib.desc_set(desc, attribute, &value, sizeof value) == CUBLAS_STATUS_SUCCESS;
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F);
  set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F);
  set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(l.weight_scales));
  set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(l.x_scales));
  const auto layout = [&](cublasLtMatrixLayout_t* to, cudaDataType_t type, uint64_t rows,
                          uint64_t cols) {
    ok = ok && lib.layout_create(to, type, rows, cols, static_cast<int64_t>(rows)) ==
                   CUBLAS_STATUS_SUCCESS;
  };
  layout(&a, CUDA_R_8F_E4M3, k, n);
  layout(&b, CUDA_R_8F_E4M3, k, m);
  layout(&d, CUDA_R_16BF, n, m);
  const uint64_t workspace_bytes = 64 << 20;
  const DeviceArray<uint8_t> workspace(static_cast<int64_t>(workspace_bytes));
  ok = ok && lib.preference_create(&preference) == CUBLAS_STATUS_SUCCESS &&
       lib.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                          sizeof workspace_bytes) == CUBLAS_STATUS_SUCCESS;
  cublasLtMatmulHeuristicResult_t choice;
  int found = 0;
  ok = ok && lib.heuristic(lib.handle, desc, a, b, d, d, preference, 1, &choice, &found) ==
                 CUBLAS_STATUS_SUCCESS;
  if (!ok || found == 0) {
    *why = "no algorithm for this shape";
    return -1;
  }
  const float one = 1, zero = 0;
  const auto launch = [&](int i, cudaStream_t stream) {
    const cublasStatus_t status =
        lib.matmul(lib.handle, desc, &one, weights(i), a, l.x, b, &zero, l.out, d, l.out, d,
                   &choice.algo, workspace.get(), workspace_bytes, stream);
    return status == CUBLAS_STATUS_SUCCESS ? absl::OkStatus()
                                           : absl::InternalError("cublasLtMatmul failed");
  };
  if (!launch(0, nullptr).ok()) {
    *why = "cublasLtMatmul refuses it";
    return -1;
  }
  // The few small descriptors live as long as the program: this is a benchmark.
  return TimeGraph(launches, launch).us;
}

#else

double TimeCublasLtFp8(const CublasLtLinear&, int, const std::function<const E4m3*(int)>&,
                       std::string* why) {
  *why = "built without cublasLt.h";
  return -1;
}

#endif

}  // namespace moebius::bench
