#pragma once

// The specification as a Backend: the row functions of this folder with serving rounding, one
// scalar loop after the other, single-threaded. Tests hold kernels/cpu and kernels/cuda against it;
// nobody serves with it. Unlike other backends it allocates freely.
//
// Its own class of numerics ("reference-v1"): other backends approximate it, bits differ.

#include <string>

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace moebius::kernels::reference {

class ReferenceBackend final : public Backend {
 public:
  std::string NumericsName() const override;

  absl::Status Embed(const EmbedParams& params) override;
  absl::Status RmsNorm(const RmsNormParams& params) override;
  absl::Status Linear(const LinearParams& params) override;
  absl::Status SwiGlu(const SwiGluParams& params) override;
  absl::Status ResidualAdd(const ResidualAddParams& params) override;
  absl::Status MoeResidual(const MoeResidualParams& params) override;
  absl::Status RopeAndCache(const RopeAndCacheParams& params) override;
  absl::Status MlaAttention(const MlaAttentionParams& params) override;
  absl::Status GateSelect(const GateSelectParams& params) override;
  absl::Status QuantizeRows(const QuantizeRowsParams& params) override;
  absl::Status ExpertFfn(const ExpertFfnParams& params) override;
  absl::Status Combine(const CombineParams& params) override;
  absl::Status Sample(const SampleParams& params) override;
  absl::Status TokenLogprobs(const TokenLogprobsParams& params) override;
  absl::Status RowDigest(const RowDigestParams& params) override;
};

}  // namespace moebius::kernels::reference
