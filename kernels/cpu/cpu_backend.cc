#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/hash.h"
#include "kernels/cpu/float_environment.h"
#include "kernels/cpu/gate.h"

namespace moebius::kernels::cpu {
namespace {

// Linear is split into units of this many outputs and rows.
constexpr int64_t kOutsPerUnit = 16, kRowsPerUnit = 64;

void CheckWeight(const MatrixView& weight) {
  CHECK(weight.data != nullptr && weight.rows > 0 && weight.cols > 0);
  CHECK((weight.dtype == DType::kE4m3) == (weight.scale_inv != nullptr));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuBackend>> CpuBackend::Create(const CpuBackendOptions& options) {
  if (options.num_threads < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_threads must be at least 1, not ", options.num_threads));
  }
  const CpuTarget target = options.target.value_or(BestTarget());
  const std::vector<CpuTarget> supported = SupportedTargets();
  if (std::find(supported.begin(), supported.end(), target) == supported.end()) {
    return absl::UnimplementedError(absl::StrCat("this machine has no ", Name(target)));
  }
  return std::unique_ptr<CpuBackend>(new CpuBackend(target, options));
}

CpuBackend::CpuBackend(CpuTarget target, const CpuBackendOptions& options)
    : target_(target),
      kernels_(KernelsFor(target)),
      min_parallel_work_(options.min_parallel_work),
      pool_(options.num_threads) {}

std::string CpuBackend::NumericsName() const { return "cpu-f32x16-v1"; }

absl::Status CpuBackend::Embed(const EmbedParams& p) {
  CHECK(p.table.dtype == DType::kBf16);
  const size_t bytes = static_cast<size_t>(p.table.cols) * sizeof(Bf16);
  for (int64_t i = 0; i < p.m; ++i) {
    CHECK(p.ids[i] >= 0 && p.ids[i] < p.table.rows);
    std::memcpy(p.out + i * p.table.cols, p.table.data + static_cast<size_t>(p.ids[i]) * bytes,
                bytes);
  }
  return absl::OkStatus();
}

absl::Status CpuBackend::RmsNorm(const RmsNormParams& p) {
  CHECK_GT(p.dim, 0);
  const FloatEnvironment environment;
  ForEachRow(p.m, p.dim * 2, [&](int64_t i, int) {
    kernels_.rms_norm(p.x + i * p.x_stride, p.weight, p.eps, p.dim, p.out + i * p.out_stride);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::Linear(const LinearParams& p) {
  CheckWeight(p.weight);
  CHECK((p.out_bf16 == nullptr) != (p.out_f32 == nullptr));
  if (p.m == 0) return absl::OkStatus();
  const FloatEnvironment environment;
  const Bf16** rows = x_rows_.Reserve(p.m);
  for (int64_t i = 0; i < p.m; ++i) rows[i] = p.x + i * p.x_stride;
  LinearArgs args;
  args.weight = p.weight;
  args.x = rows;
  args.out_bf16 = p.out_bf16;
  args.out_f32 = p.out_f32;
  args.out_stride = p.out_stride;

  const int64_t n = p.weight.rows;
  const int64_t row_blocks = CeilDiv(p.m, kRowsPerUnit);
  const int64_t units = CeilDiv(n, kOutsPerUnit) * row_blocks;
  pool_.Run(units, WorthThreads(p.m * n * p.weight.cols), [&](int64_t begin, int64_t end, int) {
    if (row_blocks == 1) {
      kernels_.linear(args, 0, p.m, begin * kOutsPerUnit, std::min(end * kOutsPerUnit, n));
      return;
    }
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t out = unit / row_blocks * kOutsPerUnit;
      const int64_t row = unit % row_blocks * kRowsPerUnit;
      kernels_.linear(args, row, std::min(row + kRowsPerUnit, p.m), out,
                      std::min(out + kOutsPerUnit, n));
    }
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::SwiGlu(const SwiGluParams& p) {
  const FloatEnvironment environment;
  ForEachRow(p.m, p.dim * 16, [&](int64_t i, int) {
    kernels_.swiglu_bf16(p.gate + i * p.dim, p.up + i * p.dim, p.dim, p.out + i * p.dim);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::ResidualAdd(const ResidualAddParams& p) {
  const FloatEnvironment environment;
  ForEachRow(p.m, p.dim, [&](int64_t i, int) {
    kernels_.residual_add(p.h + i * p.dim, p.y + i * p.dim, p.dim);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::MoeResidual(const MoeResidualParams& p) {
  const FloatEnvironment environment;
  ForEachRow(p.m, p.dim, [&](int64_t i, int) {
    const int64_t at = i * p.dim;
    kernels_.moe_residual(p.h + at, p.routed + at, p.shared + at, p.dim);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::GateSelect(const GateSelectParams& p) {
  CheckGateConfig(p.config);
  const FloatEnvironment environment;
  const int64_t experts = p.config.n_routed_experts, top_k = p.config.num_experts_per_tok;
  ForEachRow(p.m, experts * 32, [&](int64_t i, int) {
    std::array<float, kMaxExperts> scores;
    const float* logits = p.logits + i * experts;
    if (p.config.scoring_func == ScoringFunc::kSigmoid) {
      kernels_.sigmoid(logits, experts, scores.data());
    } else {
      const float sum =
          kernels_.sum_exp(logits, experts, kernels_.max(logits, experts), 1.0f, scores.data());
      for (int64_t e = 0; e < experts; ++e) scores[e] /= sum;
    }
    SelectExperts(p.config, scores.data(), p.bias, p.experts + i * top_k, p.weights + i * top_k);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::Combine(const CombineParams& p) {
  CHECK(p.top_k > 0 && p.top_k <= kMaxExpertsPerToken);
  CHECK_GT(p.experts_per_group, 0);
  const FloatEnvironment environment;
  ForEachRow(p.m, p.dim * p.top_k, [&](int64_t i, int) {
    const ExpertId* experts = p.experts + i * p.top_k;
    std::array<uint32_t, kMaxExpertsPerToken> groups;
    for (int32_t j = 0; j < p.top_k; ++j) {
      CHECK(j == 0 || experts[j - 1] < experts[j]);
      groups[j] = experts[j].value() / static_cast<uint32_t>(p.experts_per_group);
    }
    kernels_.combine_row(groups.data(), p.weights + i * p.top_k, p.rows + i * p.top_k, p.top_k,
                         p.dim, p.out + i * p.dim);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::Sample(const SampleParams& p) {
  CHECK_GT(p.vocab, 0);
  const FloatEnvironment environment;
  float* terms = sample_terms_.Reserve(p.vocab * pool_.num_threads());
  Candidate* candidates = sample_candidates_.Reserve(p.vocab * pool_.num_threads());
  ForEachRow(p.m, p.vocab * 16, [&](int64_t i, int thread) {
    const float* logits = p.logits + i * p.logits_stride;
    p.tokens[i] = SampleToken(kernels_, logits, p.vocab, p.params[i], p.token_index[i],
                              terms + thread * p.vocab, candidates + thread * p.vocab);
    cpu::TokenLogprobs(kernels_, logits, p.vocab, {&p.tokens[i], 1}, &p.logprobs[i]);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::TokenLogprobs(const TokenLogprobsParams& p) {
  const FloatEnvironment environment;
  ForEachRow(p.m, p.vocab * 16, [&](int64_t i, int) {
    cpu::TokenLogprobs(kernels_, p.logits + i * p.logits_stride, p.vocab,
                       absl::MakeConstSpan(p.tokens + i * p.per_row, p.per_row),
                       p.logprobs + i * p.per_row);
  });
  return absl::OkStatus();
}

// XXH3 of the hidden row's bytes, seeded with the bits of the log-probability.
absl::Status CpuBackend::RowDigest(const RowDigestParams& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    p.digests[i] = Hash64(p.hidden + i * p.hidden_stride, static_cast<size_t>(p.dim) * sizeof(Bf16),
                          std::bit_cast<uint32_t>(p.logprobs[i]));
  }
  return absl::OkStatus();
}

}  // namespace moebius::kernels::cpu
