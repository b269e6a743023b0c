#pragma once

// How a cluster of CTAs shares a segment, and what its CTAs keep in shared memory.
//
// Scores of different blocks do not depend on each other, nor do columns of the output. In a pass a
// cluster takes two blocks for each CTA. A CTA makes the scores of its two, one in each of two
// warpgroups; all tell each other the largest ones, from which follow the anchors of all blocks;
// then each sends its probabilities to all and adds up its columns of the output, one half in each
// warpgroup, over the blocks in ascending order. One warp loads, another sums probabilities.

#include <cstdint>

#include "kernels/cuda/mla_attention/partial.cuh"
#include "kernels/cuda/mla_attention/tile.cuh"

namespace moebius::kernels::cuda {

constexpr int kClusterThreads = 2 * 128 + 2 * 32;

template <int kCtas>
struct Cluster {
  static constexpr int kPassBlocks = 2 * kCtas;
  static constexpr int kColumns = kMlaLatentRank / kCtas;  // of a CTA
  static constexpr int kValueBoxes = kColumns / 64;        // of a block
  static constexpr int kRows = 64 / kCtas;                 // whose sums a CTA makes

  // While scores are made the boxes hold the queries and the keys of two blocks, 9 each. Once the
  // largest scores of all CTAs are known nobody needs the keys any more, and their boxes are the
  // probabilities of a pass, then values. In a cluster of eight these take the place of the queries
  // as well, which then are loaded for each pass.
  static constexpr bool kKeepsQueries = kCtas < 8;
  static constexpr int kKeys = kBoxes;
  static constexpr int kProbabilities = kKeepsQueries ? kBoxes : 0;
  static constexpr int kValues = kProbabilities + kPassBlocks;
  static constexpr int kValueSlots = (3 * kBoxes - kValues) / kValueBoxes;

  struct Shared {
    uint8_t boxes[3 * kBoxes][kBoxBytes];
    float largest[kPassBlocks][64];
    float sums[kPassBlocks][kRows][4];  // parts of four threads
    float totals[64];                   // sums of the segment
    uint64_t q_full[kBoxes], k_full[2][kBoxes];
    uint64_t scored;                   // the queries and keys have been read
    uint64_t largest_full, sums_full;  // of all blocks of the pass
    uint64_t block_full[kPassBlocks];  // probabilities and values
    uint64_t v_empty[kValueSlots];
    uint64_t passed;  // all CTAs are through with the pass
    uint64_t totals_full;
  };
  static_assert(sizeof(Shared) <= 232448, "shared memory of a CTA");
};

struct Segment {
  int row, tile;
  int blocks;            // none, if the row has no such segment
  int last;              // the last position of the last block that the row sees
  bool only;             // the row has no other segment
  const int32_t* table;  // from the first block on
  float4* slot;          // where the result goes, and before that probabilities on their way
  __device__ int LastOf(int block) const { return block + 1 == blocks ? last : 63; }
};

__device__ __forceinline__ Segment SegmentOf(const Shape& shape, int row, int segment, int tile) {
  Segment g;
  g.row = row;
  g.tile = tile;
  const MlaRow at = shape.schedule.rows[row];
  const int size = shape.schedule.SegmentBlocks(at.position);
  const int left = at.position / 64 + 1 - segment * size;
  g.blocks = max(0, min(size, left));
  g.only = segment == 0 && left <= size;
  g.last = left > size ? 63 : at.position % 64;
  g.table = shape.block_tables + at.sequence * shape.max_blocks + segment * size;
  g.slot = shape.segments +
           ((int64_t{row} * shape.max_segments + segment) * shape.tiles + tile) * 2 * kPartialHalf;
  return g;
}
static_assert(16 * kBoxBytes <= kPartialBytes, "the probabilities of a pass fit a slot");

// What StoreState (partial.cuh) writes for one of a thread's rows, in both halves.
__device__ __forceinline__ void StoreRowState(float4* slot, int row, int thread, float anchor,
                                              float sum) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float4* const state = slot + half * kPartialHalf + kPartialQuads * 128;
    float* const to = reinterpret_cast<float*>(state + 32 * (row / 16) + 4 * (row % 8) + thread);
    to[row / 8 % 2] = anchor;
    to[2 + row / 8 % 2] = sum;
  }
}

}  // namespace moebius::kernels::cuda
