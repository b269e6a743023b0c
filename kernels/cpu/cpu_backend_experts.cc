#include <algorithm>

#include "base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/float_environment.h"

namespace moebius::kernels::cpu {
namespace {

constexpr int64_t kOutsPerUnit = 16;

void CheckExpert(const ExpertFfnParams& p, const ExpertGroup& group, DType dtype) {
  const ExpertWeights& w = group.weights;
  CHECK(group.begin >= 0 && group.begin <= group.end && group.end <= p.m);
  for (const MatrixView* in : {&w.gate_proj, &w.up_proj}) {
    CHECK(in->dtype == dtype && in->data != nullptr);
    CHECK(in->rows == p.intermediate && in->cols == p.hidden);
  }
  CHECK(w.down_proj.dtype == dtype && w.down_proj.data != nullptr);
  CHECK(w.down_proj.rows == p.hidden && w.down_proj.cols == p.intermediate);
}

}  // namespace

absl::Status CpuBackend::QuantizeRows(const QuantizeRowsParams& p) {
  const FloatEnvironment environment;
  const int64_t blocks = CeilDiv(p.dim, kQuantBlock);
  ForEachRow(p.m, p.dim * 4, [&](int64_t i, int) {
    kernels_.quantize_row(p.x + i * p.dim, p.dim, p.power_of_two_scales, p.codes + i * p.dim,
                          p.scales + i * blocks);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::ExpertFfn(const ExpertFfnParams& p) {
  CHECK((p.x_codes == nullptr) != (p.x_bf16 == nullptr));
  CHECK((p.x_codes == nullptr) == (p.x_scales == nullptr));
  CHECK(p.hidden > 0 && p.intermediate > 0);
  const DType dtype = p.x_codes != nullptr ? DType::kE4m3 : DType::kBf16;
  int64_t* active = active_groups_.Reserve(p.num_groups);
  int64_t num_active = 0;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    if (p.groups[g].begin == p.groups[g].end) continue;
    CheckExpert(p, p.groups[g], dtype);
    active[num_active++] = g;
  }
  if (num_active == 0) return absl::OkStatus();
  const FloatEnvironment environment;
  LoadExpertInput(p);
  ExpertGateUp(p, num_active);
  if (p.x_codes != nullptr) RequantizeExpertHidden(p);
  ExpertDown(p, num_active);
  return absl::OkStatus();
}

// Points x_rows_ (and x_scale_rows_) at each packed row; codes are decoded to BF16, which holds
// every e4m3 value exactly.
void CpuBackend::LoadExpertInput(const ExpertFfnParams& p) {
  const Bf16** rows = x_rows_.Reserve(p.m);
  const auto source = [&](int64_t i) { return p.row_index == nullptr ? i : p.row_index[i]; };
  if (p.x_bf16 != nullptr) {
    for (int64_t i = 0; i < p.m; ++i) rows[i] = p.x_bf16 + source(i) * p.hidden;
    return;
  }
  const float** scales = x_scale_rows_.Reserve(p.m);
  Bf16* decoded = expert_input_.Reserve(p.m * p.hidden);
  const int64_t blocks = CeilDiv(p.hidden, kQuantBlock);
  ForEachRow(p.m, p.hidden, [&](int64_t i, int) {
    rows[i] = decoded + i * p.hidden;
    scales[i] = p.x_scales + source(i) * blocks;
    kernels_.decode_row(p.x_codes + source(i) * p.hidden, p.hidden, decoded + i * p.hidden);
  });
}

// expert_hidden_ = bf16(silu(x gate^T) * (x up^T)); units are slices of an expert's intermediate
// outputs.
void CpuBackend::ExpertGateUp(const ExpertFfnParams& p, int64_t num_active) {
  float* gate = expert_gate_.Reserve(p.m * p.intermediate);
  float* up = expert_up_.Reserve(p.m * p.intermediate);
  Bf16* hidden = expert_hidden_.Reserve(p.m * p.intermediate);
  const int64_t* active = active_groups_.Reserve(0);
  const int64_t slices = CeilDiv(p.intermediate, kOutsPerUnit);
  LinearArgs args;
  args.x = x_rows_.Reserve(0);
  args.x_scales = p.x_codes != nullptr ? x_scale_rows_.Reserve(0) : nullptr;
  args.out_stride = p.intermediate;
  pool_.Run(num_active * slices, WorthThreads(p.m * p.hidden * p.intermediate * 2),
            [&](int64_t begin, int64_t end, int) {
              for (int64_t unit = begin; unit < end; ++unit) {
                const ExpertGroup& group = p.groups[active[unit / slices]];
                const int64_t n = unit % slices * kOutsPerUnit;
                const int64_t n_end = std::min(n + kOutsPerUnit, p.intermediate);
                LinearArgs slice = args;
                slice.weight = group.weights.gate_proj;
                slice.out_f32 = gate;
                kernels_.linear(slice, group.begin, group.end, n, n_end);
                slice.weight = group.weights.up_proj;
                slice.out_f32 = up;
                kernels_.linear(slice, group.begin, group.end, n, n_end);
                for (int64_t i = group.begin; i < group.end; ++i) {
                  const int64_t at = i * p.intermediate + n;
                  kernels_.swiglu_f32(gate + at, up + at, n_end - n, hidden + at);
                }
              }
            });
}

// Rounds expert_hidden_ to e4m3 in 1x128 blocks and back; the scales go to expert_scales_.
void CpuBackend::RequantizeExpertHidden(const ExpertFfnParams& p) {
  const int64_t blocks = CeilDiv(p.intermediate, kQuantBlock);
  Bf16* hidden = expert_hidden_.Reserve(0);
  E4m3* codes = expert_codes_.Reserve(pool_.num_threads() * p.intermediate);
  float* scales = expert_scales_.Reserve(p.m * blocks);
  ForEachRow(p.m, p.intermediate * 8, [&](int64_t i, int thread) {
    Bf16* row = hidden + i * p.intermediate;
    E4m3* row_codes = codes + thread * p.intermediate;
    kernels_.quantize_row(row, p.intermediate, p.power_of_two_scales, row_codes,
                          scales + i * blocks);
    kernels_.decode_row(row_codes, p.intermediate, row);
  });
}

void CpuBackend::ExpertDown(const ExpertFfnParams& p, int64_t num_active) {
  const int64_t blocks = CeilDiv(p.intermediate, kQuantBlock);
  const int64_t* active = active_groups_.Reserve(0);
  const Bf16** rows = x_rows_.Reserve(p.m);
  const float** scale_rows = x_scale_rows_.Reserve(p.m);
  const Bf16* hidden = expert_hidden_.Reserve(0);
  const float* scales = p.x_codes != nullptr ? expert_scales_.Reserve(0) : nullptr;
  for (int64_t i = 0; i < p.m; ++i) {
    rows[i] = hidden + i * p.intermediate;
    if (scales != nullptr) scale_rows[i] = scales + i * blocks;
  }
  const int64_t slices = CeilDiv(p.hidden, kOutsPerUnit);
  LinearArgs args;
  args.x = rows;
  args.x_scales = scales != nullptr ? scale_rows : nullptr;
  args.out_bf16 = p.out;
  args.out_stride = p.hidden;
  pool_.Run(num_active * slices, WorthThreads(p.m * p.hidden * p.intermediate),
            [&](int64_t begin, int64_t end, int) {
              for (int64_t unit = begin; unit < end; ++unit) {
                const ExpertGroup& group = p.groups[active[unit / slices]];
                const int64_t n = unit % slices * kOutsPerUnit;
                LinearArgs slice = args;
                slice.weight = group.weights.down_proj;
                kernels_.linear(slice, group.begin, group.end, n,
                                std::min(n + kOutsPerUnit, p.hidden));
              }
            });
}

}  // namespace moebius::kernels::cpu
