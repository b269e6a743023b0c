#pragma once

// Mixture-of-experts operations: gate, row quantisation, grouped expert FFN, canonical combine.
// Formulas: DeepSeek-V3 report section 2.1.2 (sigmoid, bias, groups), DeepSeek-V2 report
// section 2.1.2 (softmax variants), V3 report section 3.3.2 (1x128 activation quantisation).

#include <cstdint>

#include "base/float_formats.h"
#include "base/ids.h"
#include "base/tensor_view.h"

namespace moebius::kernels {

enum class ScoringFunc : uint8_t { kSoftmax, kSigmoid };
enum class TopkMethod : uint8_t { kGreedy, kGroupLimitedGreedy, kNoauxTc };

struct GateConfig {
  int32_t n_routed_experts = 0;
  int32_t num_experts_per_tok = 0;
  int32_t n_group = 1;
  int32_t topk_group = 1;
  ScoringFunc scoring_func = ScoringFunc::kSigmoid;
  TopkMethod topk_method = TopkMethod::kNoauxTc;
  bool norm_topk_prob = true;
  float routed_scaling_factor = 1.0f;
};

// Chooses experts from float32 gate logits. Selection: value descending, ties to the lower index,
// for groups and experts. Output slots are in ascending expert id (the order of the canonical sum).
struct GateSelectParams {
  int64_t m = 0;
  GateConfig config;
  const float* logits = nullptr;  // [m, n_routed_experts]
  const float* bias = nullptr;    // [n_routed_experts] e_score_correction_bias, or nullptr
  ExpertId* experts = nullptr;    // [m, num_experts_per_tok], ascending within a row
  float* weights = nullptr;       // [m, num_experts_per_tok], routed_scaling_factor included
};

// One 1x128 block: amax = max(max|x|, 1e-4), s = amax / 448, code = e4m3(x / s) (true division,
// nearest even). A NaN or infinity in the block gives NaN codes and never touches other rows.
// power_of_two_scales (V3.1, scale_fmt "ue8m0"): s is rounded up to a power of two first.
struct QuantizeRowsParams {
  int64_t m = 0;
  int64_t dim = 0;
  const Bf16* x = nullptr;  // [m, dim] dense
  E4m3* codes = nullptr;    // [m, dim] dense
  float* scales = nullptr;  // [m, ceil(dim / 128)] dense
  bool power_of_two_scales = false;
};

// One expert's weights: gate_proj, up_proj [inter, hidden], down_proj [hidden, inter].
struct ExpertWeights {
  MatrixView gate_proj;
  MatrixView up_proj;
  MatrixView down_proj;
};

// Rows [begin, end) of the packed input belong to this expert; empty groups are allowed.
struct ExpertGroup {
  int64_t begin = 0;
  int64_t end = 0;
  ExpertWeights weights;
};

// out = down( bf16(silu(x gate^T) * (x up^T)) ) for each row of each group.
// Input either e4m3 codes with scales (FP8 models: the SwiGLU output is requantised 1x128 before
// down) or BF16 (BF16 models). gate and up outputs stay in float32 until the product is rounded to
// BF16. FP8: for each 128-block of K ascending, acc = fma(sa * sb, part, acc), part = sum a*b from
// zero.
struct ExpertFfnParams {
  int64_t hidden = 0;
  int64_t intermediate = 0;
  const ExpertGroup* groups = nullptr;  // [num_groups]
  int64_t num_groups = 0;
  int64_t m = 0;                       // rows in all
  const E4m3* x_codes = nullptr;       // [m, hidden], or nullptr
  const float* x_scales = nullptr;     // [m, ceil(hidden / 128)]
  const Bf16* x_bf16 = nullptr;        // [m, hidden], or nullptr
  const int32_t* row_index = nullptr;  // [m] row of x that packed row i reads; nullptr = identity
  Bf16* out = nullptr;                 // [m, hidden] in packed order
  bool power_of_two_scales = false;    // of the requantised SwiGLU output (QuantizeRowsParams)
};

// The canonical sum of one token (any deployment gives these bits):
//   per gate group g in ascending order: P_g = bf16(chain), chain = w*row of its lowest chosen
//   expert, then fma(w_e, row_e, chain) in ascending expert id;  routed = bf16(float32 sum of P_g
//   ascending).
// Models with one group use sub-groups of 32 consecutive experts.
struct CombineParams {
  int64_t m = 0;
  int64_t dim = 0;
  int32_t top_k = 0;
  int32_t experts_per_group = 32;
  const ExpertId* experts = nullptr;  // [m, top_k] ascending
  const float* weights = nullptr;     // [m, top_k]
  const Bf16* const* rows = nullptr;  // [m, top_k] pointers to rows of `dim` values
  Bf16* out = nullptr;                // [m, dim]
};

// experts_per_group of the canonical sum for a gate.
constexpr int32_t CombineGroupSize(const GateConfig& gate) {
  return gate.n_group > 1 ? gate.n_routed_experts / gate.n_group : 32;
}

}  // namespace moebius::kernels
