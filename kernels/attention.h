#pragma once

// Multi-head latent attention (DeepSeek-V2 report section 2.1, V3 report section 2.1.1) over a
// paged cache of latents, in the absorbed form for every position.
//
// Latent cache of one layer: [num_blocks, 64, latent_dim] in BF16, latent_dim = kv_lora_rank +
// qk_rope_head_dim; a row holds the normalised latent c, then the rotated rope key kr. Position t
// of a sequence lies in row t % 64 of block block_table[t / 64].

#include <cstdint>

#include "base/float_formats.h"
#include "base/tensor_view.h"

namespace moebius::kernels {

inline constexpr int64_t kCacheBlockTokens = 64;

struct MlaDims {
  int64_t num_heads = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t kv_lora_rank = 0;
  int64_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }
  int64_t q_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
};

// Where a query row stands: its absolute position in its sequence and the sequence's blocks.
struct SequenceRow {
  int32_t position = 0;                  // t >= 0
  const int32_t* block_table = nullptr;  // [t / 64 + 1] block numbers
};

// Rotates the rope part of every head of q in place and writes the latent-cache row of each token:
//   cache[t] = [ bf16(RMSNorm(kv[0:kv_lora_rank], kv_norm)) , bf16(RoPE(kv[kv_lora_rank:], t)) ]
// Pairs are interleaved, (2i, 2i+1); angle = float(t) * inv_freq[i] in float32; rotation in
// float32, one rounding. cos and sin come from `cos_sin`, a table the model computes once.
struct RopeAndCacheParams {
  int64_t m = 0;
  MlaDims dims;
  Bf16* q = nullptr;         // [m, num_heads, q_head_dim] dense, in place: nope first, then rope
  const Bf16* kv = nullptr;  // [m, latent_dim], row stride kv_stride: raw kv_a output
  int64_t kv_stride = 0;
  const float* kv_norm = nullptr;  // [kv_lora_rank]
  float kv_norm_eps = 1e-6f;
  const float* cos_sin = nullptr;     // [max_positions, qk_rope_head_dim/2, 2]: cos, sin
  const SequenceRow* rows = nullptr;  // [m]; no two rows share a (block, offset)
  Bf16* cache = nullptr;              // this layer's blocks
};

// For each row and head h, with K_h, V_h the k_nope and v rows of kv_b (each weight rounded to BF16
// after its scale):
//   q_lat = bf16(q_nope * K_h)                                    [kv_lora_rank]
//   score(s) = (q_lat . c(s) + q_rope . kr(s)) * softmax_scale     s = 0..t
//   u = bf16(sum_s softmax(score)(s) * c(s)),   out_h = bf16(V_h * u)
// Keys are read only from the cache (those of the same call too) in absolute 64-token blocks, in
// ascending order, online softmax in float32; masked entries are not read.
struct MlaAttentionParams {
  int64_t m = 0;
  MlaDims dims;
  const Bf16* q = nullptr;  // [m, num_heads, q_head_dim] dense, rotated
  MatrixView kv_b;          // [num_heads * (qk_nope + v), kv_lora_rank]
  float softmax_scale = 0;
  const SequenceRow* rows = nullptr;  // [m]
  const Bf16* cache = nullptr;        // this layer's blocks
  Bf16* out = nullptr;                // [m, num_heads, v_head_dim] dense
};

}  // namespace moebius::kernels
