#pragma once

// A Backend that breaks the row rule on purpose, in the way real ones do: its Linear splits K over
// two workers when the batch is large, as GEMM libraries do. The checkers must find it.

#include <string>

#include "tests/kernels/forwarding_backend.h"

namespace moebius::kernels::cpu {

// Forwards everything to `inner` (borrowed), except Linear with BF16 weights and m >= 8.
class BatchDependentBackend final : public ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;

  std::string NumericsName() const override { return "batch-dependent"; }
  absl::Status Linear(const LinearParams& p) override {
    if (p.m < 8 || p.weight.dtype != DType::kBf16) return ForwardingBackend::Linear(p);
    const Bf16* weight = reinterpret_cast<const Bf16*>(p.weight.data);
    const int64_t k_end = p.weight.cols, middle = k_end / 2;
    for (int64_t i = 0; i < p.m; ++i) {
      for (int64_t n = 0; n < p.weight.rows; ++n) {
        float halves[2] = {0, 0};
        for (int64_t k = 0; k < k_end; ++k) {
          halves[k < middle ? 0 : 1] +=
              ToFloat(p.x[i * p.x_stride + k]) * ToFloat(weight[n * k_end + k]);
        }
        const float sum = halves[0] + halves[1];
        if (p.out_f32 != nullptr) p.out_f32[i * p.out_stride + n] = sum;
        if (p.out_bf16 != nullptr) p.out_bf16[i * p.out_stride + n] = ToBf16(sum);
      }
    }
    return absl::OkStatus();
  }
};

}  // namespace moebius::kernels::cpu
