#pragma once

// The inner kernels, compiled once per instruction set and chosen at run time as a table of
// functions. Each works on a range of rows and outputs on the calling thread; CpuBackend splits the
// ranges over threads. All pointers are borrowed; no kernel allocates, reads a clock or keeps
// state. Numerics: lanes16-inl.h.

#include <cstdint>

#include "base/float_formats.h"
#include "base/tensor_view.h"
#include "kernels/attention.h"
#include "kernels/cpu/targets.h"

namespace moebius::kernels::cpu {

// out[i][n - n_origin] = x[i] . W[n], for F32 and BF16 weights one chain per lane over the whole K,
// for e4m3 weights
//   part = lane sums of one 128-block of K from zero, acc = fma(scale, part, acc) per lane,
// with scale = W's (times x's, if x is quantised too). One ReduceAdd at the end.
// Weights enter as value / 256 and their scale as scale * 256, which changes no bit unless a
// product is below 2^-118 or a scale above 2^119.
struct LinearArgs {
  MatrixView weight;
  // kE4m3 only: each weight is rounded to BF16 after its scale and K is one chain (MLA's kv_b).
  bool round_weights = false;
  const Bf16* const* x = nullptr;          // row pointers, [k] each
  const float* const* x_scales = nullptr;  // per row [ceil(k / 128)], or nullptr
  Bf16* out_bf16 = nullptr;                // exactly one of the two; row stride out_stride
  float* out_f32 = nullptr;
  int64_t out_stride = 0;
  int64_t n_origin = 0;
};

// q' of one head for rows [row_begin, row_end):
//   q_latent[i][h] = [ bf16(q_nope * K_h), q_rope ] with one chain over q_nope's dims per element.
struct QueryLatentArgs {
  MlaDims dims;
  const Bf16* q = nullptr;  // [rows, num_heads, q_head_dim]
  MatrixView kv_b;
  Bf16* q_latent = nullptr;  // [rows, num_heads, latent_dim]
};

// Latent attention of one row and a range of heads:
//   u[h] = bf16(sum over s of softmax(q'_h . cache(s) * softmax_scale) * c(s)).
struct LatentAttentionArgs {
  MlaDims dims;
  const Bf16* q_latent = nullptr;  // this row's [num_heads, latent_dim]
  float softmax_scale = 0;
  SequenceRow row;
  const Bf16* cache = nullptr;
  Bf16* u = nullptr;         // this row's [num_heads, kv_lora_rank]
  float* scratch = nullptr;  // LatentAttentionScratch(dims) floats of the calling thread
};

// Heads that LatentAttention takes through a cache block together.
inline constexpr int64_t kHeadTile = 8;

// Floats of scratch: per head of a tile its query, its weighted latent sum, a block's scores.
inline int64_t LatentAttentionScratch(const MlaDims& dims) {
  return kHeadTile * (CeilDiv(dims.latent_dim(), 16) * 16 + CeilDiv(dims.kv_lora_rank, 16) * 16 +
                      kCacheBlockTokens);
}

struct KernelTable {
  // Rows [row_begin, row_end) and outputs [n_begin, n_end).
  void (*linear)(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t n_begin,
                 int64_t n_end);

  void (*query_latent)(const QueryLatentArgs& args, int64_t row_begin, int64_t row_end,
                       int64_t head);
  void (*latent_attention)(const LatentAttentionArgs& args, int64_t head_begin, int64_t head_end);

  // out = bf16((x * (1 / sqrt(sum(x^2) / dim + eps))) * weight); out may alias x.
  void (*rms_norm)(const Bf16* x, const float* weight, float eps, int64_t dim, Bf16* out);
  // out = bf16((gate / (1 + exp(-gate))) * up).
  void (*swiglu_bf16)(const Bf16* gate, const Bf16* up, int64_t dim, Bf16* out);
  void (*swiglu_f32)(const float* gate, const float* up, int64_t dim, Bf16* out);
  // h = bf16(h + y).
  void (*residual_add)(Bf16* h, const Bf16* y, int64_t dim);
  // h = bf16(h + bf16(routed + shared)).
  void (*moe_residual)(Bf16* h, const Bf16* routed, const Bf16* shared, int64_t dim);

  // One row: codes and a scale per 128-block (QuantizeRowsParams).
  void (*quantize_row)(const Bf16* x, int64_t dim, bool power_of_two_scales, E4m3* codes,
                       float* scales);
  // out[i] = value of codes[i]; exact, NaN included.
  void (*decode_row)(const E4m3* codes, int64_t dim, Bf16* out);
  // One token of CombineParams.
  void (*combine_row)(const uint32_t* groups, const float* weights, const Bf16* const* rows,
                      int32_t top_k, int64_t dim, Bf16* out);

  // out[i] = 1 / (1 + exp(-x[i])); out may alias x.
  void (*sigmoid)(const float* x, int64_t count, float* out);
  // The largest value; NaN counts as -infinity.
  float (*max)(const float* x, int64_t count);
  // Sum of exp((x[i] - shift) / divisor), lane sums and the fixed tree; the terms go to `out`
  // unless it is nullptr.
  float (*sum_exp)(const float* x, int64_t count, float shift, float divisor, float* out);
  // out[i] = exp(x[i]); for tests of its error.
  void (*exp)(const float* x, int64_t count, float* out);
};

// REQUIRES: `target` is one of SupportedTargets().
const KernelTable& KernelsFor(CpuTarget target);

// Each source file of kernels fills its part of the table.
void FillLinearKernels(CpuTarget target, KernelTable& table);
void FillAttentionKernels(CpuTarget target, KernelTable& table);
void FillDenseKernels(CpuTarget target, KernelTable& table);
void FillExpertKernels(CpuTarget target, KernelTable& table);
void FillSamplingKernels(CpuTarget target, KernelTable& table);

}  // namespace moebius::kernels::cpu
