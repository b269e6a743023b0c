#pragma once

// A Backend that breaks the row rule on purpose, in the way real ones do: its Linear splits K over
// two workers when the batch is large, as GEMM libraries do. The checkers must find it.

#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/backend.h"

namespace moebius::kernels::cpu {

// Forwards everything to `inner` (borrowed), except Linear with BF16 weights and m >= 8.
class BatchDependentBackend final : public Backend {
 public:
  explicit BatchDependentBackend(Backend* inner) : inner_(*inner) {}

  std::string NumericsName() const override { return "batch-dependent"; }
  absl::Status Linear(const LinearParams& p) override {
    if (p.m < 8 || p.weight.dtype != DType::kBf16) return inner_.Linear(p);
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

  absl::Status Embed(const EmbedParams& p) override { return inner_.Embed(p); }
  absl::Status RmsNorm(const RmsNormParams& p) override { return inner_.RmsNorm(p); }
  absl::Status SwiGlu(const SwiGluParams& p) override { return inner_.SwiGlu(p); }
  absl::Status ResidualAdd(const ResidualAddParams& p) override { return inner_.ResidualAdd(p); }
  absl::Status MoeResidual(const MoeResidualParams& p) override { return inner_.MoeResidual(p); }
  absl::Status RopeAndCache(const RopeAndCacheParams& p) override { return inner_.RopeAndCache(p); }
  absl::Status MlaAttention(const MlaAttentionParams& p) override { return inner_.MlaAttention(p); }
  absl::Status GateSelect(const GateSelectParams& p) override { return inner_.GateSelect(p); }
  absl::Status QuantizeRows(const QuantizeRowsParams& p) override { return inner_.QuantizeRows(p); }
  absl::Status ExpertFfn(const ExpertFfnParams& p) override { return inner_.ExpertFfn(p); }
  absl::Status Combine(const CombineParams& p) override { return inner_.Combine(p); }
  absl::Status Sample(const SampleParams& p) override { return inner_.Sample(p); }
  absl::Status RowDigest(const RowDigestParams& p) override { return inner_.RowDigest(p); }

 private:
  Backend& inner_;
};

}  // namespace moebius::kernels::cpu
