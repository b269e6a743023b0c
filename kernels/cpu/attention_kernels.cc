#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/target_dispatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_kernels.cc"
// The next line includes this file once per target.
#include "hwy/foreach_target.h"
// Per-target part of the file from here.
#include "kernels/cpu/lanes16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moebius::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

// ---- q_latent = bf16(q_nope * K_h): element j is one chain over d = 0..nope-1.

#if HWY_TARGET == HWY_AVX3
inline constexpr int kQueryRows = 4, kQueryVectors = 4;
#else
inline constexpr int kQueryRows = 4, kQueryVectors = 1;
#endif

// The k_nope rows of one head in kv_b, each weight rounded to BF16 after the scale.
class KeyWeights {
 public:
  KeyWeights(const MatrixView& kv_b, int64_t first_row, int64_t rows)
      : kv_b_(kv_b), first_row_(first_row), blocks_(CeilDiv(kv_b.cols, kQuantBlock)) {
    has_nan_ =
        kv_b.dtype == DType::kE4m3 && HasNanCode(Codes(first_row * kv_b.cols), rows * kv_b.cols);
  }

  // Sixteen weights (or the last `count`) of row d from column `col`, a multiple of 16.
  HWY_INLINE F32x16 LoadAt(int64_t d, int64_t col, int64_t count) const {
    const int64_t row = first_row_ + d, at = row * kv_b_.cols + col;
    if (kv_b_.dtype == DType::kBf16) {
      const Bf16* from = reinterpret_cast<const Bf16*>(kv_b_.data) + at;
      return count == kLanes ? LoadBf16(from) : LoadBf16Tail(from, count);
    }
    const E4m3* from = Codes(at);
    const F32x16 decoded = count == kLanes ? DecodeDiv256(from) : DecodeDiv256Tail(from, count);
    // Sixteen columns from a multiple of 16 lie in one 128-block.
    const float scale = kv_b_.scale_inv[row / kQuantBlock * blocks_ + col / kQuantBlock];
    const F32x16 weight = RoundBf16(Mul(decoded, Set(scale * kDecodedE4m3Scale)));
    return HWY_UNLIKELY(has_nan_) ? WithNan(weight, from, count) : weight;
  }

 private:
  const E4m3* Codes(int64_t at) const { return reinterpret_cast<const E4m3*>(kv_b_.data) + at; }

  static HWY_NOINLINE F32x16 WithNan(const F32x16& weight, const E4m3* codes, int64_t count) {
    alignas(64) float lanes[kLanes];
    Store(weight, lanes);
    for (int64_t l = 0; l < count; ++l) {
      if ((codes[l].bits & 0x7F) == 0x7F) lanes[l] = std::numeric_limits<float>::quiet_NaN();
    }
    return Load(lanes);
  }

  const MatrixView& kv_b_;
  const int64_t first_row_;
  const int64_t blocks_;
  bool has_nan_;
};

// Rows [row, row + kRows) at columns [col, col + kVectors * 16) (the last vector: `count` of them).
template <int kRows, int kVectors>
HWY_NOINLINE void QueryLatentTile(const QueryLatentArgs& args, const KeyWeights& keys, int64_t row,
                                  int64_t head, int64_t col, int64_t count) {
  const MlaDims& dims = args.dims;
  const int64_t q_stride = dims.num_heads * dims.q_head_dim();
  const Bf16* q = args.q + row * q_stride + head * dims.q_head_dim();
  F32x16 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Zero();
  }
  for (int64_t d = 0; d < dims.qk_nope_head_dim; ++d) {
    F32x16 query[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) query[i] = Set(ToFloat(q[i * q_stride + d]));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const F32x16 weight = keys.LoadAt(d, col + v * kLanes, v + 1 == kVectors ? count : kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) acc[i][v] = Fma(query[i], weight, acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    Bf16* out = args.q_latent + ((row + i) * dims.num_heads + head) * dims.latent_dim() + col;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (v + 1 == kVectors && count < kLanes) {
        StoreBf16Tail(acc[i][v], out + v * kLanes, count);
      } else {
        StoreBf16(acc[i][v], out + v * kLanes);
      }
    }
  }
}

template <int kRows>
void QueryLatentRows(const QueryLatentArgs& args, const KeyWeights& keys, int64_t row,
                     int64_t head) {
  const int64_t rank = args.dims.kv_lora_rank;
  int64_t col = 0;
  for (; col + kQueryVectors * kLanes <= rank; col += kQueryVectors * kLanes) {
    QueryLatentTile<kRows, kQueryVectors>(args, keys, row, head, col, kLanes);
  }
  for (; col < rank; col += kLanes) {
    QueryLatentTile<kRows, 1>(args, keys, row, head, col, HWY_MIN(rank - col, kLanes));
  }
}

void QueryLatent(const QueryLatentArgs& args, int64_t row_begin, int64_t row_end, int64_t head) {
  const MlaDims& dims = args.dims;
  const KeyWeights keys(args.kv_b, head * (dims.qk_nope_head_dim + dims.v_head_dim),
                        dims.qk_nope_head_dim);
  int64_t row = row_begin;
  for (; row + kQueryRows <= row_end; row += kQueryRows) {
    QueryLatentRows<kQueryRows>(args, keys, row, head);
  }
  for (; row < row_end; ++row) QueryLatentRows<1>(args, keys, row, head);
  for (row = row_begin; row < row_end; ++row) {
    const int64_t at = row * dims.num_heads + head;
    std::memcpy(args.q_latent + at * dims.latent_dim() + dims.kv_lora_rank,
                args.q + at * dims.q_head_dim() + dims.qk_nope_head_dim,
                static_cast<size_t>(dims.qk_rope_head_dim) * sizeof(Bf16));
  }
}

// ---- Latent attention: online softmax over absolute 64-token blocks.

#if HWY_TARGET == HWY_AVX3
inline constexpr int kScoreHeads = 4, kScoreTokens = 2, kSumVectors = 2;
#else
inline constexpr int kScoreHeads = 2, kScoreTokens = 2, kSumVectors = 2;
#endif

// scores[h][s] for kHeads heads and kTokens tokens: lane sums over latent_dim, then the tree.
template <int kHeads, int kTokens>
HWY_INLINE void ScoreTile(const float* query, int64_t query_stride, const Bf16* tokens,
                          int64_t latent_dim, float softmax_scale, float* scores) {
  F32x16 acc[kHeads][kTokens];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int s = 0; s < kTokens; ++s) acc[h][s] = Zero();
  }
  ForLaneSteps(latent_dim, [&](int64_t k, int64_t count) HWY_ATTR {
    F32x16 token[kTokens];
#pragma GCC unroll 8
    for (int s = 0; s < kTokens; ++s) {
      const Bf16* from = tokens + s * latent_dim + k;
      token[s] = count == kLanes ? LoadBf16(from) : LoadBf16Tail(from, count);
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      // The query is padded with zeros to whole vectors.
      const F32x16 lanes = Load(query + h * query_stride + k);
#pragma GCC unroll 8
      for (int s = 0; s < kTokens; ++s) acc[h][s] = Fma(lanes, token[s], acc[h][s]);
    }
  });
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int s = 0; s < kTokens; ++s) {
      scores[h * kCacheBlockTokens + s] = ReduceAdd(acc[h][s]) * softmax_scale;
    }
  }
}

template <int kHeads>
HWY_NOINLINE void ScoreBlock(const float* query, int64_t query_stride, const Bf16* tokens,
                             int64_t count, int64_t latent_dim, float softmax_scale,
                             float* scores) {
  int64_t s = 0;
  for (; s + kScoreTokens <= count; s += kScoreTokens) {
    ScoreTile<kHeads, kScoreTokens>(query, query_stride, tokens + s * latent_dim, latent_dim,
                                    softmax_scale, scores + s);
  }
  for (; s < count; ++s) {
    ScoreTile<kHeads, 1>(query, query_stride, tokens + s * latent_dim, latent_dim, softmax_scale,
                         scores + s);
  }
}

// u[h][j] = u[h][j] * rescale[h], then fma of p[h][s] * c_s[j] in ascending s.
template <int kHeads, int kVectors>
HWY_INLINE void SumTile(const float* p, const float* rescale, const Bf16* tokens, int64_t count,
                        int64_t latent_dim, int64_t tail, float* u, int64_t u_stride) {
  F32x16 acc[kHeads][kVectors];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[h][v] = Mul(Load(u + h * u_stride + v * kLanes), Set(rescale[h]));
    }
  }
  for (int64_t s = 0; s < count; ++s) {
    F32x16 latent[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Bf16* from = tokens + s * latent_dim + v * kLanes;
      latent[v] = tail == kLanes ? LoadBf16(from) : LoadBf16Tail(from, tail);
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      const F32x16 weight = Set(p[h * kCacheBlockTokens + s]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[h][v] = Fma(weight, latent[v], acc[h][v]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) Store(acc[h][v], u + h * u_stride + v * kLanes);
  }
}

template <int kHeads>
HWY_NOINLINE void SumBlock(const float* p, const float* rescale, const Bf16* tokens, int64_t count,
                           int64_t latent_dim, int64_t rank, float* u, int64_t u_stride) {
  int64_t j = 0;
  for (; j + kSumVectors * kLanes <= rank; j += kSumVectors * kLanes) {
    SumTile<kHeads, kSumVectors>(p, rescale, tokens + j, count, latent_dim, kLanes, u + j,
                                 u_stride);
  }
  for (; j < rank; j += kLanes) {
    SumTile<kHeads, 1>(p, rescale, tokens + j, count, latent_dim, HWY_MIN(rank - j, kLanes), u + j,
                       u_stride);
  }
}

// Turns a block's scores into p = exp(score - new maximum); updates the row's maximum and sum and
// returns by how much earlier sums shrink. Lanes past `count` read as -infinity: p = 0.
HWY_INLINE float SoftmaxBlock(float* scores, int64_t count, float& maximum, float& sum) {
  for (int64_t s = count; s < kCacheBlockTokens; ++s) {
    scores[s] = -std::numeric_limits<float>::infinity();
  }
  F32x16 largest = Set(maximum);
  for (int64_t s = 0; s < kCacheBlockTokens; s += kLanes) largest = Max(largest, Load(scores + s));
  alignas(64) float lanes[kLanes];
  Store(largest, lanes);
  float new_maximum = lanes[0];
  for (int l = 1; l < kLanes; ++l) new_maximum = lanes[l] > new_maximum ? lanes[l] : new_maximum;

  const F32x16 shift = Set(new_maximum);
  F32x16 block_sum = Zero();
  for (int64_t s = 0; s < kCacheBlockTokens; s += kLanes) {
    const F32x16 p = Exp(Sub(Load(scores + s), shift));
    Store(p, scores + s);
    block_sum = Add(block_sum, p);
  }
  Store(Exp(Set(maximum - new_maximum)), lanes);
  const float rescale = lanes[0];
  sum = sum * rescale + ReduceAdd(block_sum);
  maximum = new_maximum;
  return rescale;
}

// Heads [head, head + heads), heads <= kHeadTile, through all blocks of the row.
void AttendHeads(const LatentAttentionArgs& args, int64_t head, int64_t heads) {
  const MlaDims& dims = args.dims;
  const int64_t latent_dim = dims.latent_dim(), rank = dims.kv_lora_rank;
  const int64_t q_stride = CeilDiv(latent_dim, kLanes) * kLanes;
  const int64_t u_stride = CeilDiv(rank, kLanes) * kLanes;
  float* query = args.scratch;
  float* u = query + kHeadTile * q_stride;
  float* scores = u + kHeadTile * u_stride;
  std::memset(args.scratch, 0, static_cast<size_t>(LatentAttentionScratch(dims)) * sizeof(float));
  float maximum[kHeadTile], sum[kHeadTile], rescale[kHeadTile];
  for (int64_t h = 0; h < heads; ++h) {
    const Bf16* from = args.q_latent + (head + h) * latent_dim;
    for (int64_t k = 0; k < latent_dim; ++k) query[h * q_stride + k] = ToFloat(from[k]);
    maximum[h] = -std::numeric_limits<float>::infinity();
    sum[h] = 0.0f;
  }

  const int64_t keys = int64_t{args.row.position} + 1;
  for (int64_t first = 0; first < keys; first += kCacheBlockTokens) {
    const int64_t count = HWY_MIN(keys - first, kCacheBlockTokens);
    const Bf16* tokens = args.cache + int64_t{args.row.block_table[first / kCacheBlockTokens]} *
                                          kCacheBlockTokens * latent_dim;
    int64_t h = 0;
    for (; h + kScoreHeads <= heads; h += kScoreHeads) {
      ScoreBlock<kScoreHeads>(query + h * q_stride, q_stride, tokens, count, latent_dim,
                              args.softmax_scale, scores + h * kCacheBlockTokens);
    }
    for (; h < heads; ++h) {
      ScoreBlock<1>(query + h * q_stride, q_stride, tokens, count, latent_dim, args.softmax_scale,
                    scores + h * kCacheBlockTokens);
    }
    for (h = 0; h < heads; ++h) {
      rescale[h] = SoftmaxBlock(scores + h * kCacheBlockTokens, count, maximum[h], sum[h]);
    }
    for (h = 0; h + kScoreHeads <= heads; h += kScoreHeads) {
      SumBlock<kScoreHeads>(scores + h * kCacheBlockTokens, rescale + h, tokens, count, latent_dim,
                            rank, u + h * u_stride, u_stride);
    }
    for (; h < heads; ++h) {
      SumBlock<1>(scores + h * kCacheBlockTokens, rescale + h, tokens, count, latent_dim, rank,
                  u + h * u_stride, u_stride);
    }
  }

  for (int64_t h = 0; h < heads; ++h) {
    Bf16* out = args.u + (head + h) * rank;
    const F32x16 divisor = Set(sum[h]);
    ForLaneSteps(rank, [&](int64_t j, int64_t count) HWY_ATTR {
      const F32x16 mean = Div(Load(u + h * u_stride + j), divisor);
      if (count == kLanes) {
        StoreBf16(mean, out + j);
      } else {
        StoreBf16Tail(mean, out + j, count);
      }
    });
  }
}

void LatentAttention(const LatentAttentionArgs& args, int64_t head_begin, int64_t head_end) {
  for (int64_t head = head_begin; head < head_end; head += kHeadTile) {
    AttendHeads(args, head, HWY_MIN(head_end - head, kHeadTile));
  }
}

}  // namespace

void FillAttention(KernelTable& table) {
  table.query_latent = &QueryLatent;
  table.latent_attention = &LatentAttention;
}

}  // namespace HWY_NAMESPACE
}  // namespace moebius::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moebius::kernels::cpu {

MOEBIUS_DEFINE_FILL(FillAttentionKernels, FillAttention)

}  // namespace moebius::kernels::cpu
#endif
