#include <algorithm>
#include <array>

#include "base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/float_environment.h"

namespace moebius::kernels::cpu {
namespace {

// Rows whose latent queries are held at once, so that scratch does not grow with the prompt.
constexpr int64_t kRowChunk = 64;
// Rows that share one pass over a head's weights.
constexpr int64_t kRowsPerUnit = 16;

void CheckDims(const MlaDims& dims) {
  CHECK(dims.num_heads > 0 && dims.kv_lora_rank > 0 && dims.v_head_dim > 0);
  CHECK(dims.qk_nope_head_dim > 0);
  CHECK(dims.qk_rope_head_dim >= 0 && dims.qk_rope_head_dim % 2 == 0);
}

// Rotates `x` [dim] by the angles of one position: two products and one sum per element, each
// rounded to float32, then one rounding to BF16.
void Rotate(const Bf16* x, const float* cos_sin, int64_t dim, Bf16* out) {
  for (int64_t i = 0; i < dim; i += 2) {
    const float even = ToFloat(x[i]), odd = ToFloat(x[i + 1]);
    const float cos = cos_sin[i], sin = cos_sin[i + 1];
    out[i] = ToBf16(even * cos - odd * sin);
    out[i + 1] = ToBf16(even * sin + odd * cos);
  }
}

}  // namespace

absl::Status CpuBackend::RopeAndCache(const RopeAndCacheParams& p) {
  CheckDims(p.dims);
  const FloatEnvironment environment;
  const MlaDims& dims = p.dims;
  const int64_t rope = dims.qk_rope_head_dim, rank = dims.kv_lora_rank;
  ForEachRow(p.m, dims.num_heads * rope * 2 + rank * 2, [&](int64_t i, int) {
    const int64_t position = p.rows[i].position;
    const float* cos_sin = p.cos_sin + position * rope;
    for (int64_t h = 0; h < dims.num_heads; ++h) {
      Bf16* q = p.q + (i * dims.num_heads + h) * dims.q_head_dim() + dims.qk_nope_head_dim;
      Rotate(q, cos_sin, rope, q);
    }
    const Bf16* kv = p.kv + i * p.kv_stride;
    const int64_t block = p.rows[i].block_table[position / kCacheBlockTokens];
    Bf16* row =
        p.cache + (block * kCacheBlockTokens + position % kCacheBlockTokens) * dims.latent_dim();
    kernels_.rms_norm(kv, p.kv_norm, p.kv_norm_eps, rank, row);
    Rotate(kv + rank, cos_sin, rope, row + rank);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::MlaAttention(const MlaAttentionParams& p) {
  CheckDims(p.dims);
  const MlaDims& dims = p.dims;
  const int64_t heads = dims.num_heads, rank = dims.kv_lora_rank, v_dim = dims.v_head_dim;
  const int64_t head_rows = dims.qk_nope_head_dim + v_dim;
  CHECK(p.kv_b.dtype == DType::kBf16 || p.kv_b.dtype == DType::kE4m3);
  CHECK(p.kv_b.rows == heads * head_rows && p.kv_b.cols == rank);
  if (p.m == 0) return absl::OkStatus();
  const FloatEnvironment environment;
  const int64_t chunk = std::min(p.m, kRowChunk);
  Bf16* q_latent = query_latent_.Reserve(chunk * heads * dims.latent_dim());
  Bf16* latent_sum = latent_sum_.Reserve(chunk * heads * rank);
  const int64_t scratch_size = LatentAttentionScratch(dims);
  float* scratch = attention_.Reserve(scratch_size * pool_.num_threads());

  for (int64_t first = 0; first < p.m; first += kRowChunk) {
    const int64_t rows = std::min(kRowChunk, p.m - first);
    const int64_t row_units = CeilDiv(rows, kRowsPerUnit);
    const bool weights_worth_threads = WorthThreads(rows * heads * rank * head_rows);

    QueryLatentArgs query;
    query.dims = dims;
    query.q = p.q + first * heads * dims.q_head_dim();
    query.kv_b = p.kv_b;
    query.q_latent = q_latent;
    pool_.Run(heads * row_units, weights_worth_threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit % row_units * kRowsPerUnit;
        kernels_.query_latent(query, row, std::min(row + kRowsPerUnit, rows), unit / row_units);
      }
    });

    const int64_t head_tiles = CeilDiv(heads, kHeadTile);
    int64_t keys = 0;
    for (int64_t i = 0; i < rows; ++i) {
      CHECK_GE(p.rows[first + i].position, 0);
      keys += p.rows[first + i].position + 1;
    }
    pool_.Run(rows * head_tiles, WorthThreads(keys * heads * dims.latent_dim() * 2),
              [&](int64_t begin, int64_t end, int thread) {
                for (int64_t unit = begin; unit < end; ++unit) {
                  const int64_t i = unit / head_tiles;
                  LatentAttentionArgs args;
                  args.dims = dims;
                  args.q_latent = q_latent + i * heads * dims.latent_dim();
                  args.softmax_scale = p.softmax_scale;
                  args.row = p.rows[first + i];
                  args.cache = p.cache;
                  args.u = latent_sum + i * heads * rank;
                  args.scratch = scratch + thread * scratch_size;
                  const int64_t head = unit % head_tiles * kHeadTile;
                  kernels_.latent_attention(args, head, std::min(head + kHeadTile, heads));
                }
              });

    pool_.Run(heads * row_units, weights_worth_threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t head = unit / row_units;
        const int64_t row = unit % row_units * kRowsPerUnit;
        const int64_t count = std::min(kRowsPerUnit, rows - row);
        std::array<const Bf16*, kRowsPerUnit> sums;
        for (int64_t i = 0; i < count; ++i) {
          sums[i] = latent_sum + ((row + i) * heads + head) * rank;
        }
        LinearArgs value;
        value.weight = p.kv_b;
        value.round_weights = true;
        value.x = sums.data();
        value.out_bf16 = p.out + ((first + row) * heads + head) * v_dim;
        value.out_stride = heads * v_dim;
        value.n_origin = head * head_rows + dims.qk_nope_head_dim;
        kernels_.linear(value, 0, count, value.n_origin, value.n_origin + v_dim);
      }
    });
  }
  return absl::OkStatus();
}

}  // namespace moebius::kernels::cpu
