#pragma once

// A Backend that hands every operation to another one, between two hooks; for tests that watch or
// replace single operations.

#include <string>

#include "kernels/backend.h"

namespace moebius::kernels {

class ForwardingBackend : public Backend {
 public:
  // Borrows `inner`.
  explicit ForwardingBackend(Backend* inner) : inner_(*inner) {}

  std::string NumericsName() const override { return inner_.NumericsName(); }
  absl::Status Embed(const EmbedParams& p) override {
    return Forward([&] { return inner_.Embed(p); });
  }
  absl::Status RmsNorm(const RmsNormParams& p) override {
    return Forward([&] { return inner_.RmsNorm(p); });
  }
  absl::Status Linear(const LinearParams& p) override {
    return Forward([&] { return inner_.Linear(p); });
  }
  absl::Status SwiGlu(const SwiGluParams& p) override {
    return Forward([&] { return inner_.SwiGlu(p); });
  }
  absl::Status ResidualAdd(const ResidualAddParams& p) override {
    return Forward([&] { return inner_.ResidualAdd(p); });
  }
  absl::Status MoeResidual(const MoeResidualParams& p) override {
    return Forward([&] { return inner_.MoeResidual(p); });
  }
  absl::Status RopeAndCache(const RopeAndCacheParams& p) override {
    return Forward([&] { return inner_.RopeAndCache(p); });
  }
  absl::Status MlaAttention(const MlaAttentionParams& p) override {
    return Forward([&] { return inner_.MlaAttention(p); });
  }
  absl::Status GateSelect(const GateSelectParams& p) override {
    return Forward([&] { return inner_.GateSelect(p); });
  }
  absl::Status QuantizeRows(const QuantizeRowsParams& p) override {
    return Forward([&] { return inner_.QuantizeRows(p); });
  }
  absl::Status ExpertFfn(const ExpertFfnParams& p) override {
    return Forward([&] { return inner_.ExpertFfn(p); });
  }
  absl::Status Combine(const CombineParams& p) override {
    return Forward([&] { return inner_.Combine(p); });
  }
  absl::Status Sample(const SampleParams& p) override {
    return Forward([&] { return inner_.Sample(p); });
  }
  absl::Status TokenLogprobs(const TokenLogprobsParams& p) override {
    return Forward([&] { return inner_.TokenLogprobs(p); });
  }
  absl::Status RowDigest(const RowDigestParams& p) override {
    return Forward([&] { return inner_.RowDigest(p); });
  }

 protected:
  virtual void BeforeCall() {}
  virtual void AfterCall() {}

 private:
  template <class Call>
  absl::Status Forward(const Call& call) {
    BeforeCall();
    absl::Status status = call();
    AfterCall();
    return status;
  }

  Backend& inner_;
};

}  // namespace moebius::kernels
