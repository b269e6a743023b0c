#pragma once

// From the accumulators of wgmma (rows of the weight by tokens, kernels/cuda/device/wgmma.cuh) to
// rows of the output: straight from registers, or through shared memory and the copy engine.

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bf16.cuh"
#include "kernels/cuda/device/bulk_store.cuh"
#include "kernels/cuda/device/store_matrix.cuh"

namespace moebius::kernels::cuda {

struct Output {
  void* data;
  bool f32;
  bool vectors;  // rows begin where four elements can be stored at once
  bool bulk;     // and the copy engine can store them
  int m, n;
  int64_t stride, head_stride;  // elements
};

// Stores a warp's 16 rows of the weight from row0 on, of kTokens tokens. All lanes take part.
template <int kTokens>
__device__ __forceinline__ void StoreSums(const Output& out, int head, int row0, int token0,
                                          const float (&sums)[kTokens / 2]) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  if (out.f32) {
    float* const base = static_cast<float*>(out.data) + head * out.head_stride;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int row = row0 + lane / 4 + 8 * (i % 4 / 2);
      const int token = token0 + 8 * (i / 4) + 2 * quad + i % 2;
      // Evicted first: among a stream of weights, lines kept for later cost more than they save.
      if (row < out.n && token < out.m) __stcs(base + token * out.stride + row, sums[i]);
    }
    return;
  }
  uint16_t* const base = static_cast<uint16_t*>(out.data) + head * out.head_stride;
  const bool whole = out.vectors && row0 + 16 <= out.n;
  // Each thread gathers four rows of one token: 32-byte pieces of a row of the output.
  const int row = row0 + (quad % 2 == 0 ? 2 * quad : 8 + 2 * (quad - 1));
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const uint32_t low = TransposeMatrix(RoundToBf16Pair(sums[4 * j], sums[4 * j + 1]));
    const uint32_t high = TransposeMatrix(RoundToBf16Pair(sums[4 * j + 2], sums[4 * j + 3]));
    const uint32_t other = __shfl_xor_sync(0xffffffff, quad % 2 == 0 ? high : low, 1);
    const uint2 four = quad % 2 == 0 ? make_uint2(low, other) : make_uint2(other, high);
    const int token = token0 + 8 * j + lane / 4;
    if (token >= out.m) continue;
    uint16_t* const to = base + token * out.stride + row;
    if (whole) {
      *reinterpret_cast<uint2*>(to) = four;
    } else {
      if (row < out.n) to[0] = static_cast<uint16_t>(four.x);
      if (row + 1 < out.n) to[1] = static_cast<uint16_t>(four.x >> 16);
      if (row + 2 < out.n) to[2] = static_cast<uint16_t>(four.y);
      if (row + 3 < out.n) to[3] = static_cast<uint16_t>(four.y >> 16);
    }
  }
}

// What a warpgroup hands to the copy engine at a time: 4 KB, 64 rows of the weight by so many
// tokens, in boxes of 128 bytes of rows, so that a warp's writes spread over all banks.
template <bool kF32>
inline constexpr int kPieceTokens = kF32 ? 16 : 32;
inline constexpr int kPieceBytes = 4096;

// Writes a warp's part (16 rows from 16 * warp on) of a piece.
__device__ __forceinline__ void WritePiece(uint8_t* piece, int warp, const float (&sums)[8],
                                           std::true_type /*f32*/) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i % 4 / 2);
    const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    const int chunk = row % 32 / 4 ^ (token & 7);
    *reinterpret_cast<float*>(piece + row / 32 * 2048 + token * 128 + chunk * 16 + row % 4 * 4) =
        sums[i];
  }
}
__device__ __forceinline__ void WritePiece(uint8_t* piece, int warp, const float (&sums)[16],
                                           std::false_type /*bf16*/) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    // Four 8 x 8 matrices, each transposed: lane l names row l % 8 of matrix l / 8.
    const int token = 8 * (j + lane / 16) + lane % 8;
    const int chunk = (2 * warp + lane / 8 % 2) ^ (token & 7);
    const float* const v = sums + 4 * j;
    StoreMatrices4Transposed(SharedAddress(piece + token * 128 + chunk * 16),
                             RoundToBf16Pair(v[0], v[1]), RoundToBf16Pair(v[2], v[3]),
                             RoundToBf16Pair(v[4], v[5]), RoundToBf16Pair(v[6], v[7]));
  }
}

// Stores a warpgroup's kSubs times 64 rows from column0 of the map on. `pieces`: kPieces times
// kPieceBytes, 1024-aligned, filled together; `barrier`: a named barrier of the warpgroup.
// FinishBulkStores before the memory goes.
template <int kTokens, int kSubs, int kPieces, bool kF32>
__device__ __forceinline__ void StoreSumsInBulk(const CUtensorMap* map, uint8_t* pieces,
                                                int barrier, int column0, int token0,
                                                const float (&sums)[kSubs][kTokens / 2]) {
  constexpr int kStep = kPieceTokens<kF32>;
  constexpr int kRounds = kSubs * kTokens / kStep;
  const int warp = threadIdx.x / 32 % 4;
  const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int sub = round / (kTokens / kStep), first = round % (kTokens / kStep) * kStep;
    if (round % kPieces == 0) {
      if (leader) StoresHaveRead();
      NamedBarrier(barrier, 128);
    }
    float part[kStep / 2];
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) part[i] = sums[sub][first / 2 + i];
    WritePiece(pieces + round % kPieces * kPieceBytes, warp, part, std::bool_constant<kF32>());
    if (round % kPieces != kPieces - 1 && round != kRounds - 1) continue;
    ProxyFence();
    NamedBarrier(barrier, 128);
    if (!leader) continue;
#pragma unroll
    for (int filled = round / kPieces * kPieces; filled <= round; ++filled) {
      const uint8_t* const piece = pieces + filled % kPieces * kPieceBytes;
      const int x = column0 + filled / (kTokens / kStep) * 64;
      const int y = token0 + filled % (kTokens / kStep) * kStep;
      TmaStore2d(map, piece, x, y);
      if constexpr (kF32) TmaStore2d(map, piece + 2048, x + 32, y);
    }
    StoresCommit();
  }
}
__device__ __forceinline__ void FinishBulkStores() {
  if (threadIdx.x % 128 == 0) StoresHaveRead();
}

}  // namespace moebius::kernels::cuda
