#pragma once

// A Backend in plain scalar loops for simulated clusters: every row is computed alone, so the row
// rule holds by construction and a difference between two runs is the orchestration's fault.
// Weights are decoded to float32 once and shared between instances, which makes thousands of tiny
// runs affordable. Not a specification (kernels/reference) and not fast (kernels/cpu).
//
// Threading: an instance is used by one thread at a time; instances of one DecodedWeights must be
// used from one thread.

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace moebius::cluster_test {

// float32 copies of weight matrices, by the address of their data, which must not be reused while
// this lives.
class DecodedWeights {
 public:
  struct Matrix {
    std::vector<float> rows;     // [rows][cols]
    std::vector<float> columns;  // [cols][rows]
  };
  const Matrix& Get(const MatrixView& view);

 private:
  std::map<const std::byte*, Matrix> matrices_;
};

class ScalarBackend final : public kernels::Backend {
 public:
  explicit ScalarBackend(std::shared_ptr<DecodedWeights> weights) : weights_(std::move(weights)) {
    scores_.reserve(kLongestContext);
  }

  std::string NumericsName() const override { return "scalar-test-v1"; }
  absl::Status Embed(const kernels::EmbedParams& p) override;
  absl::Status RmsNorm(const kernels::RmsNormParams& p) override;
  absl::Status Linear(const kernels::LinearParams& p) override;
  absl::Status SwiGlu(const kernels::SwiGluParams& p) override;
  absl::Status ResidualAdd(const kernels::ResidualAddParams& p) override;
  absl::Status MoeResidual(const kernels::MoeResidualParams& p) override;
  absl::Status RopeAndCache(const kernels::RopeAndCacheParams& p) override;
  absl::Status MlaAttention(const kernels::MlaAttentionParams& p) override;
  absl::Status GateSelect(const kernels::GateSelectParams& p) override;
  absl::Status QuantizeRows(const kernels::QuantizeRowsParams& p) override;
  absl::Status ExpertFfn(const kernels::ExpertFfnParams& p) override;
  absl::Status Combine(const kernels::CombineParams& p) override;
  absl::Status Sample(const kernels::SampleParams& p) override;
  absl::Status TokenLogprobs(const kernels::TokenLogprobsParams& p) override;
  absl::Status RowDigest(const kernels::RowDigestParams& p) override;

 private:
  // sums[n] = x . W[n] for one row, K ascending.
  void Product(const MatrixView& weight, const float* x, float* sums);
  void SampleRow(const float* logits, int64_t vocab, const kernels::SamplingParams& params,
                 uint64_t token_index, TokenId* token, float* logprob);

  std::shared_ptr<DecodedWeights> weights_;
  static constexpr int64_t kLongestContext = 4096;  // beyond it attention allocates
  std::vector<float> x_, sums_, more_sums_, scores_;
  std::vector<std::byte> bytes_;
};

}  // namespace moebius::cluster_test
