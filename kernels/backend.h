#pragma once

// The seam between the model's mathematics and what executes it. A Backend runs one operation at a
// time, synchronously, on the calling compute thread (it may fan out to threads of its own over
// rows and outputs, never over K). An instance is used by one thread at a time; several may exist.
//
// Row rule: every output element is a function of its own row's inputs and the weights alone; not
// of m, of other rows, of the number of threads. tests/kernels/row_rule_test holds each backend to
// it.
//
// Memory: a backend allocates its scratch in the constructor and on the first calls of each shape
// (warm-up); after that a call allocates nothing.
//
// Errors: shapes are our own contract and CHECKed; a device that fails gives a Status, after which
// the instance must not be used again.

#include <string>

#include "absl/status/status.h"
#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/moe.h"
#include "kernels/sampling.h"

namespace moebius::kernels {

class Backend {
 public:
  virtual ~Backend() = default;

  // Names the numerics class: backends with equal names give equal bits ("cpu-f32x16-v1").
  virtual std::string NumericsName() const = 0;

  virtual absl::Status Embed(const EmbedParams& params) = 0;
  virtual absl::Status RmsNorm(const RmsNormParams& params) = 0;
  virtual absl::Status Linear(const LinearParams& params) = 0;
  virtual absl::Status SwiGlu(const SwiGluParams& params) = 0;
  virtual absl::Status ResidualAdd(const ResidualAddParams& params) = 0;
  virtual absl::Status MoeResidual(const MoeResidualParams& params) = 0;
  virtual absl::Status RopeAndCache(const RopeAndCacheParams& params) = 0;
  virtual absl::Status MlaAttention(const MlaAttentionParams& params) = 0;
  virtual absl::Status GateSelect(const GateSelectParams& params) = 0;
  virtual absl::Status QuantizeRows(const QuantizeRowsParams& params) = 0;
  virtual absl::Status ExpertFfn(const ExpertFfnParams& params) = 0;
  virtual absl::Status Combine(const CombineParams& params) = 0;
  virtual absl::Status Sample(const SampleParams& params) = 0;
  virtual absl::Status TokenLogprobs(const TokenLogprobsParams& params) = 0;
  virtual absl::Status RowDigest(const RowDigestParams& params) = 0;
};

}  // namespace moebius::kernels
