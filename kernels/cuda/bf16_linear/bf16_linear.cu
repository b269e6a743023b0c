#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/bf16_linear/bf16_linear.h"
#include "kernels/cuda/bf16_linear/output.cuh"
#include "kernels/cuda/bf16_linear/resident.cuh"
#include "kernels/cuda/bf16_linear/stream.cuh"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/device/tensor_map.h"

namespace moebius::kernels::cuda {
namespace {

int Tiles(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

int WeightHeadRows(const Bf16LinearParams& p) {
  return static_cast<int>(p.weight_head_stride / p.weight_stride);
}

// Boxes of 64 of K (transposed: of 64 rows of the product) and `box_rows`.
absl::StatusOr<CUtensorMap> WeightsMap(const Bf16LinearParams& p, int box_rows) {
  MatrixMap map;
  map.element_bytes = 2;
  map.base = p.weight;
  map.row_stride_bytes = static_cast<uint64_t>(p.weight_stride) * 2;
  const int64_t rows = p.weight_transposed ? p.k : p.n;
  map.rows = static_cast<uint64_t>((p.heads - 1) * WeightHeadRows(p) + rows);
  map.cols = static_cast<uint64_t>(p.weight_transposed ? p.n : p.k);
  map.box_cols = 64;
  map.box_rows = static_cast<uint32_t>(box_rows);
  return EncodeMatrixMap(map);
}
absl::StatusOr<CUtensorMap> TokensMap(const Bf16LinearParams& p, int box_rows) {
  MatrixMap map;
  map.element_bytes = 2;
  map.base = p.x;
  map.row_stride_bytes = static_cast<uint64_t>(p.x_stride) * 2;
  map.rows = static_cast<uint64_t>(p.m);
  map.cols = static_cast<uint64_t>((p.heads - 1) * p.x_head_stride + p.k);
  map.box_cols = 64;
  map.box_rows = static_cast<uint32_t>(box_rows);
  return EncodeMatrixMap(map);
}

// With `bulk`, stored by the copy engine where rows allow it.
Output OutputOf(const Bf16LinearParams& p, bool bulk) {
  const bool f32 = p.out_f32 != nullptr;
  void* const data = f32 ? static_cast<void*>(p.out_f32) : static_cast<void*>(p.out_bf16);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data,
          f32,
          aligned && p.out_stride % 4 == 0 && p.out_head_stride % 4 == 0,
          bulk && aligned && p.out_stride % (f32 ? 4 : 8) == 0,
          static_cast<int>(p.m),
          static_cast<int>(p.n),
          p.out_stride,
          p.out_head_stride};
}
absl::StatusOr<CUtensorMap> BulkOutputMap(const Bf16LinearParams& p, const Output& out) {
  MatrixMap map;
  map.base = out.data;
  map.element_bytes = out.f32 ? 4 : 2;
  map.row_stride_bytes = static_cast<uint64_t>(p.out_stride * map.element_bytes);
  map.rows = static_cast<uint64_t>(p.m);
  map.cols = static_cast<uint64_t>((p.heads - 1) * p.out_head_stride + p.n);
  map.box_cols = out.f32 ? 32 : 64;
  map.box_rows = out.f32 ? kPieceTokens<true> : kPieceTokens<false>;
  return EncodeMatrixMap(map);
}

template <typename T>
absl::Status LaunchStream(const Bf16LinearParams& p, int segments, cudaStream_t stream) {
  StreamShape shape;
  shape.heads = static_cast<int>(p.heads);
  shape.n_tiles = Tiles(p.n, T::kRows);
  shape.m_tiles = Tiles(p.m, T::kTokens);
  shape.k_blocks = Tiles(p.k, kBlock);
  shape.segments = segments;
  shape.x_head_cols = static_cast<int>(p.x_head_stride);
  shape.weight_head_rows = WeightHeadRows(p);
  // Weights that other tiles read again stay in L2. So do those of a single chain (the LM head):
  // evicted first, they make the writes of its many outputs dearer (docs/kernels-cuda.md).
  const bool once = shape.m_tiles == 1 && (segments > 1 || p.heads > 1);
  shape.weights_policy = once ? kEvictFirst : kEvictNormal;
  // The copy engine leaves out what lies beyond the whole output, not what lies beyond a head:
  // there a ragged last tile would write into the next head's columns.
  const bool whole_heads = p.heads == 1 || p.n % T::kRows == 0;
  shape.out = OutputOf(p, T::kBulk && segments == 1 && whole_heads);
  ASSIGN_OR_RETURN(const CUtensorMap weights, WeightsMap(p, T::kTransposed ? kBlock : T::kRows));
  ASSIGN_OR_RETURN(const CUtensorMap tokens, TokensMap(p, T::kTokens));
  CUtensorMap out = {};
  if (shape.out.bulk) {
    ASSIGN_OR_RETURN(out, BulkOutputMap(p, shape.out));
  }

  const int tiles = shape.n_tiles * shape.m_tiles * shape.heads;
  LaunchShape launch;
  // Segments meet in memory that the next tile's copies would overwrite: one tile a cluster.
  launch.grid = dim3(static_cast<unsigned>(
      segments > 1 ? tiles * segments : std::min(tiles, T::kCtas * MultiprocessorCount())));
  launch.cluster = dim3(static_cast<unsigned>(segments));
  launch.threads = T::kThreads + 32;
  launch.shared_bytes = T::kBytes;
  // The start of a kernel that takes hundreds of microseconds needs no hiding.
  launch.overlaps = p.heads * p.n * p.k < int64_t{200'000'000};
  return Launch("Bf16Linear", Bf16LinearStream<T>, launch, stream, weights, tokens, out, shape);
}

template <int kTokens, int kSegments>
absl::Status LaunchResident(const Bf16LinearParams& p, cudaStream_t stream) {
  using T = ResidentTile<kTokens, kSegments>;
  ResidentShape shape;
  shape.m_tiles = Tiles(p.m, kTokens);
  shape.k_blocks = Tiles(p.k, kBlock);
  shape.out = OutputOf(p, false);
  ASSIGN_OR_RETURN(const CUtensorMap weights, WeightsMap(p, T::kRows));
  ASSIGN_OR_RETURN(const CUtensorMap tokens, TokensMap(p, kTokens));
  LaunchShape launch;
  launch.grid = dim3(static_cast<unsigned>(Tiles(p.n, T::kRows) * shape.m_tiles * kSegments));
  launch.cluster = dim3(kSegments);
  launch.threads = T::kThreads + 32;
  launch.shared_bytes = T::kBytes;
  launch.overlaps = true;
  return Launch("Bf16Linear", Bf16LinearResident<T>, launch, stream, weights, tokens, shape);
}

// The kinds of tile. What a tile is made of does not reach the bits; the times that chose them are
// in docs/kernels-cuda.md.
template <int kTokens>  // a long stream of weights
using StreamTile = Tile<kTokens, 2, 2, 1, false, false>;
template <int kTokens>  // by head, K-major
using HeadTile = Tile<kTokens, 2, 1, 1, false, true>;
template <int kTokens>  // by head, MN-major, short K: all of it is on its way at once
using TransposedTile = Tile<kTokens, 2, kTokens <= 32 ? 2 : 1, 2, true, true>;

template <template <int> typename TileOf, int kMostTokens>
absl::Status LaunchStreamFor(const Bf16LinearParams& p, int segments, cudaStream_t stream) {
  if (p.m <= 8) return LaunchStream<TileOf<8>>(p, segments, stream);
  if (p.m <= 16) return LaunchStream<TileOf<16>>(p, segments, stream);
  if (p.m <= 32) return LaunchStream<TileOf<32>>(p, segments, stream);
  if (p.m <= 64 || kMostTokens == 64) return LaunchStream<TileOf<64>>(p, segments, stream);
  return LaunchStream<TileOf<kMostTokens>>(p, segments, stream);
}

// Whether segments fit into shared memory, and tiles into about two rounds of the multiprocessors:
// beyond, larger tiles are faster.
bool IsResident(const Bf16LinearParams& p, int segments) {
  using T = ResidentTile<64, 1>;
  constexpr int64_t kMostCtas = 256;
  const int64_t tiles = int64_t{Tiles(p.n, T::kRows)} * Tiles(p.m, T::kTokens);
  return p.heads == 1 && !p.weight_transposed && tiles * segments <= kMostCtas &&
         Tiles(Tiles(p.k, kBlock), segments) <= T::kMostBlocks;
}
template <int kSegments>
absl::Status LaunchResidentIn(const Bf16LinearParams& p, cudaStream_t stream) {
  if (p.m <= 8) return LaunchResident<8, kSegments>(p, stream);
  if (p.m <= 16) return LaunchResident<16, kSegments>(p, stream);
  if (p.m <= 32) return LaunchResident<32, kSegments>(p, stream);
  return LaunchResident<64, kSegments>(p, stream);
}
absl::Status LaunchResidentFor(const Bf16LinearParams& p, int segments, cudaStream_t stream) {
  if (segments == 1) return LaunchResidentIn<1>(p, stream);
  if (segments == 2) return LaunchResidentIn<2>(p, stream);
  if (segments == 4) return LaunchResidentIn<4>(p, stream);
  return LaunchResidentIn<8>(p, stream);
}

absl::Status Validate(const Bf16LinearParams& p) {
  const auto bad = [](const char* field, int64_t value) {
    return absl::InvalidArgumentError(absl::StrCat("Bf16Linear: ", field, " is ", value));
  };
  constexpr int64_t kMost = int64_t{1} << 24;
  const bool plain = p.heads == 1 && !p.weight_transposed;
  if (p.m < 0 || p.m > kMost) return bad("m", p.m);
  if (p.n <= 0 || p.n > kMost || (p.weight_transposed && p.n % 8 != 0)) return bad("n", p.n);
  if (p.k <= 0 || p.k > kMost || p.k % (plain ? 8 : 64) != 0) return bad("k", p.k);
  if (p.heads <= 0 || p.heads > 4096) return bad("heads", p.heads);
  if (p.x_stride < p.k || p.x_stride % 8 != 0) return bad("x_stride", p.x_stride);
  if (p.x_head_stride < 0 || p.heads * p.x_head_stride > kMost)
    return bad("x_head_stride", p.x_head_stride);
  if (p.weight_stride < (p.weight_transposed ? p.n : p.k) || p.weight_stride % 8 != 0)
    return bad("weight_stride", p.weight_stride);
  if (p.weight_head_stride < 0 || p.weight_head_stride % p.weight_stride != 0 ||
      p.weight_head_stride / p.weight_stride > kMost / p.heads) {
    return bad("weight_head_stride", p.weight_head_stride);
  }
  if (p.out_stride < p.n) return bad("out_stride", p.out_stride);
  if (p.out_head_stride < 0 || p.heads * p.out_head_stride > int64_t{1} << 30)
    return bad("out_head_stride", p.out_head_stride);
  if ((p.m / 8 + 1) * (p.n / 64 + 1) * p.heads > int64_t{1} << 26)
    return bad("m * n * heads", p.m * p.n * p.heads);
  RETURN_IF_ERROR(CheckPointer("Bf16Linear", "x", p.x, 16));
  RETURN_IF_ERROR(CheckPointer("Bf16Linear", "weight", p.weight, 16));
  if ((p.out_bf16 == nullptr) == (p.out_f32 == nullptr))
    return Refuse("Bf16Linear", "not exactly one of out_bf16, out_f32 is set");
  return p.out_f32 != nullptr ? CheckPointer("Bf16Linear", "out_f32", p.out_f32, 4)
                              : CheckPointer("Bf16Linear", "out_bf16", p.out_bf16, 2);
}

}  // namespace

int Bf16LinearSegments(int64_t n, int64_t k) {
  const int64_t tiles = (n + 255) / 256, k_blocks = (k + kBlock - 1) / kBlock;
  int segments = 1;
  while (segments < kMostSegments && tiles * segments < 96 && k_blocks >= 8 * segments)
    segments *= 2;
  return segments;
}

absl::Status LaunchBf16Linear(const Bf16LinearParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(Validate(p));
  const int segments = p.heads == 1 ? Bf16LinearSegments(p.n, p.k) : 1;
  if (IsResident(p, segments)) return LaunchResidentFor(p, segments, stream);
  if (p.weight_transposed) return LaunchStreamFor<TransposedTile, 64>(p, segments, stream);
  if (p.heads > 1 && p.n <= 128) return LaunchStreamFor<HeadTile, 128>(p, segments, stream);
  return LaunchStreamFor<StreamTile, 128>(p, segments, stream);
}

}  // namespace moebius::kernels::cuda
