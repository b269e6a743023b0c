#pragma once

// The Backend on CPUs: Highway kernels with run-time dispatch (AVX-512, AVX2, portable), weights
// read in place (FP8 and BF16, straight from the mapped file), threads over rows and outputs.
//
// Numerics class "cpu-f32x16-v1": every target and thread count gives the same bits, because all
// kernels are written in one virtual vector of 16 float lanes with explicit fma and one fixed tree
// (lanes16-inl.h). The arithmetic of each operation is stated where its kernel is declared
// (kernel_table.h, sampler.h). A change of any bit is a new version of the name.
//
//   auto backend = CpuBackend::Create({.num_threads = 4});
//   if (!backend.ok()) return backend.status();
//   RETURN_IF_ERROR((*backend)->Linear(params));

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/sampler.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/targets.h"
#include "kernels/cpu/thread_pool.h"

namespace moebius::kernels::cpu {

struct CpuBackendOptions {
  int num_threads = 1;  // in all, the calling one included
  // nullopt: the fastest this machine has.
  std::optional<CpuTarget> target;
  // Operations with fewer multiply-adds run on the calling thread: waking others would cost more.
  int64_t min_parallel_work = int64_t{1} << 18;
};

// One instance is used by one thread at a time (Backend). Scratch grows with the first calls of a
// shape; after that no call allocates.
class CpuBackend final : public Backend {
 public:
  // InvalidArgument for num_threads < 1, Unimplemented for a target this machine lacks.
  static absl::StatusOr<std::unique_ptr<CpuBackend>> Create(const CpuBackendOptions& options);

  CpuTarget target() const { return target_; }

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

 private:
  CpuBackend(CpuTarget target, const CpuBackendOptions& options);

  // function(row, thread) for every row of [0, rows), on several threads if rows * work_per_row
  // multiply-adds are worth it.
  template <class Function>
  void ForEachRow(int64_t rows, int64_t work_per_row, const Function& function);

  bool WorthThreads(int64_t work) const { return work >= min_parallel_work_; }

  // The grouped FFN's stages (cpu_backend_experts.cc).
  void LoadExpertInput(const ExpertFfnParams& params);
  void ExpertGateUp(const ExpertFfnParams& params, int64_t num_active);
  void RequantizeExpertHidden(const ExpertFfnParams& params);
  void ExpertDown(const ExpertFfnParams& params, int64_t num_active);

  const CpuTarget target_;
  const KernelTable& kernels_;
  const int64_t min_parallel_work_;
  ThreadPool pool_;

  Scratch<const Bf16*> x_rows_;
  Scratch<const float*> x_scale_rows_;
  Scratch<int64_t> active_groups_;
  Scratch<Bf16> expert_input_;    // [m, hidden]: decoded codes
  Scratch<float> expert_gate_;    // [m, intermediate]
  Scratch<float> expert_up_;      // [m, intermediate]
  Scratch<Bf16> expert_hidden_;   // [m, intermediate]
  Scratch<E4m3> expert_codes_;    // [threads, intermediate]
  Scratch<float> expert_scales_;  // [m, ceil(intermediate / 128)]
  Scratch<Bf16> query_latent_;    // [row chunk, num_heads, latent_dim]
  Scratch<Bf16> latent_sum_;      // [row chunk, num_heads, kv_lora_rank]
  Scratch<float> attention_;      // [threads, LatentAttentionScratch]
  Scratch<float> sample_terms_;   // [threads, vocab]
  Scratch<Candidate> sample_candidates_;
};

template <class Function>
void CpuBackend::ForEachRow(int64_t rows, int64_t work_per_row, const Function& function) {
  pool_.Run(rows, WorthThreads(rows * work_per_row), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t row = begin; row < end; ++row) function(row, thread);
  });
}

}  // namespace moebius::kernels::cpu
