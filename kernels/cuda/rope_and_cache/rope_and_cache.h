#pragma once

// The step between the projections and MLA attention (kernels/attention.h, RopeAndCacheParams;
// DeepSeek-V2 report section 2.1), for every row:
//   cache[t]            = [ bf16(RMSNorm(kv[0:rank], kv_norm)), bf16(RoPE(kv[rank:], t)) ]
//   q_absorbed[h, rank:] = bf16(RoPE(q[h, nope:], t))   for every head h
// The latent part of q_absorbed comes from the absorb GEMM; the two do not wait for each other.
//
// Rotation: interleaved pairs, each product rounded, their difference or sum rounded in float32,
// then to BF16: bit-equal to kernels/reference. The RMSNorm has the tree of
// device/row_statistics.cuh, a function of kv_lora_rank alone: the same bits as LaunchRmsNorm.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"
#include "kernels/attention.h"

namespace moebius::kernels::cuda {

// Device pointers, those inside of `rows` too, borrowed until the stream has passed the launch.
// Strides in elements. Any alignment is taken; multiples of 16 bytes are fast.
struct RopeAndCacheParams {
  int64_t m = 0;  // rows; 0 does nothing
  // kv_lora_rank 1 .. 4096; qk_rope_head_dim even, 2 .. 1024. v_head_dim is not read.
  MlaDims dims;
  const Bf16* q = nullptr;     // [m, num_heads, q_head_dim] dense: nope first, then rope
  Bf16* q_absorbed = nullptr;  // [m, num_heads, latent_dim] dense; only the last rope columns are
                               // written
  const Bf16* kv = nullptr;    // [m, latent_dim], row stride kv_stride: raw kv_a output
  int64_t kv_stride = 0;
  // Constants of the model: read before the kernel in front on the stream has ended.
  const float* kv_norm = nullptr;  // [kv_lora_rank]
  float kv_norm_eps = 1e-6f;
  const float* cos_sin = nullptr;     // [max_positions, qk_rope_head_dim / 2, 2]: cos, sin
  const SequenceRow* rows = nullptr;  // [m]; no two rows share a (block, offset)
  Bf16* cache = nullptr;              // [num_blocks, 64, latent_dim], this layer's
};

// Enqueues on `stream`. Errors: INVALID_ARGUMENT naming the field; INTERNAL if the launch fails.
// Any thread.
absl::Status LaunchRopeAndCache(const RopeAndCacheParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
