#pragma once

// Multi-head latent attention over the paged latent cache, absorbed form (kernels/attention.h;
// DeepSeek-V2 report section 2.1): for each row and head, with q the absorbed latent query followed
// by the rotated rope query and k(s) = [c(s), kr(s)] the cache row of position s,
//   score(s) = (q . k(s)) * softmax_scale, s = 0 .. t,   u = bf16(sum_s softmax(score)(s) * c(s)).
// The projections around it (q_nope K_h before, V_h u after) are other kernels' work.
//
// The bits of an output row are a function of its own q, t and cache rows 0 .. t (docs/adr/0012):
// - Positions are cut at multiples of MlaSegmentTokens(num_heads, t) from 0. A segment starts from
// nothing and
//   takes its 64-token blocks in ascending order: scores by wgmma, k16 ascending over the 576
//   values; anchor' = max(anchor, ceil(largest score in units of log2)); p = 2^(score - anchor');
//   O = O * 2^(anchor - anchor') + bf16(p) c by wgmma, four k16 ascending; sums of p in float32.
// - Segments are merged in ascending order, one chain: A = fma(O, 2^(m - M'), A * 2^(M - M')).
// Who computes a segment, and whether segments meet in registers or in device memory, is free: it
// follows the batch and does not reach the bits. Positions beyond t of the last block weigh exactly
// 0 and are cleared before use, so nothing in them (NaN, Inf) reaches a result.

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

inline constexpr int kMlaLatentRank = 512;  // values of c
inline constexpr int kMlaLatentDim = 576;   // and 64 of the rope key
inline constexpr int kMlaMaxHeads = 128;
inline constexpr int kMlaLongSegmentTokens = 2048;
inline constexpr int kMlaShortSegmentTokens = 1024;

// The size of the segments of a row at `position`, for `num_heads` heads of one GPU: short ones for
// long contexts, which come in small batches and need more CTAs a row; long ones where a batch or
// few heads leave little to gain from them.
constexpr int MlaSegmentTokens(int64_t num_heads, int64_t position) {
  return num_heads > 64 && position >= 6144 ? kMlaShortSegmentTokens : kMlaLongSegmentTokens;
}

// A query row: position t of the sequence whose blocks are row `sequence` of the block tables.
struct MlaRow {
  int32_t position = 0;
  int32_t sequence = 0;
};

// Device pointers, borrowed until the stream has passed the launch.
struct MlaAttentionCoreParams {
  int64_t m = 0;                          // query rows, any mix of sequences; 0 does nothing
  int64_t num_heads = 0;                  // 1 .. kMlaMaxHeads
  const Bf16* q = nullptr;                // [m, num_heads, 576] dense, 16-aligned
  float softmax_scale = 0;                // > 0
  const MlaRow* rows = nullptr;           // [m]
  const int32_t* block_tables = nullptr;  // [sequences, max_blocks]: block of positions 64 b ..
  int64_t max_blocks = 0;                 // row stride of block_tables
  const Bf16* cache = nullptr;            // [num_blocks, 64, 576] dense, 16-aligned
  int64_t num_blocks = 0;
  // No position is max_context or beyond. A bound for the schedule and the workspace only: the
  // closer it is, the better few rows are spread over the multiprocessors.
  int64_t max_context = 0;
  Bf16* out = nullptr;  // [m, num_heads, 512] dense, 4-aligned
  // MlaAttentionWorkspaceBytes(...) or more, 16-aligned; contents before and after do not matter.
  // Of one launch at a time: launches that share it are on one stream.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// What LaunchMlaAttention wants for up to `m` rows of up to `max_context` tokens: never less for
// more of either. Any thread.
int64_t MlaAttentionWorkspaceBytes(int64_t m, int64_t num_heads, int64_t max_context);

// Enqueues on `stream`. Errors: INVALID_ARGUMENT for a shape or pointer that it cannot take, naming
// it; INTERNAL if a launch fails. Any thread.
absl::Status LaunchMlaAttention(const MlaAttentionCoreParams& params, cudaStream_t stream);

// The CTAs that LaunchMlaAttention gives to each segment: 8, 4 or 2 where segments are few, else 1.
// Does not reach the bits; for tests.
int MlaSegmentCtas(int64_t m, int64_t num_heads, int64_t max_context);

// LaunchMlaAttention with another segment size (a positive multiple of 128 tokens; 0: that of
// MlaSegmentTokens): other bits. For the comparison in docs/adr/0012 and for the test that a split
// chosen by the batch is noticed.
absl::Status LaunchMlaAttentionWithSegments(const MlaAttentionCoreParams& params,
                                            int64_t segment_tokens, cudaStream_t stream);
int64_t MlaAttentionWorkspaceBytesWithSegments(int64_t m, int64_t num_heads, int64_t max_context,
                                               int64_t segment_tokens);

}  // namespace moebius::kernels::cuda
