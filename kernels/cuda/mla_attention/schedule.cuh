#pragma once

// Who computes which segments of which rows. A group of CTAs (one for each 64 heads) takes whole
// rows, or, when there are few, a contiguous run of segments over all rows. Nothing here reaches
// the bits of a result.

#include <cstdint>

#include "kernels/cuda/mla_attention/mla_attention.h"

namespace moebius::kernels::cuda {

// Rows of which a schedule of segments is made; more are dealt out whole.
inline constexpr int kMaxSplitRows = 256;

struct MlaSchedule {
  int m;
  int groups;
  int heads;
  int segment_blocks;  // 0: MlaSegmentTokens
  bool split;          // rows may be shared among groups; m <= kMaxSplitRows
  const MlaRow* rows;

  // The row at a place of the order in which groups share rows. Neighbours, which often are queries
  // of one sequence, stand a quarter of the order apart: then groups compute them at the same time,
  // and the sequence is read from memory once.
  __device__ int RowAt(int place) const {
#pragma unroll
    for (int quarter = 0; quarter < 3; ++quarter) {
      const int size = (m + 3 - quarter) / 4;
      if (place < size) return 4 * place + quarter;
      place -= size;
    }
    return 4 * place + 3;
  }
  __device__ int SegmentBlocks(int position) const {
    return segment_blocks > 0 ? segment_blocks : MlaSegmentTokens(heads, position) / 64;
  }
};

// Segments [begin, end) of a row that has `segments`.
struct MlaWork {
  int row, begin, end, segments;
  MlaRow at;
  __device__ bool Whole() const { return begin == 0 && end == segments; }
};

// What a schedule of segments is read from, in shared memory.
struct MlaShares {
  int first_block[kMaxSplitRows + 1];  // by place: sum of the block counts of the places before
  int warp_sums[kMaxSplitRows / 32];
  // Blocks of a group: a segment belongs to the group in whose share its first block lies. Shares
  // of whole segments where they are long enough, so that equal rows stay in one piece.
  int share;
};

// Fills `shares`. All threads of the block (at least kMaxSplitRows); ends with a barrier.
__device__ __forceinline__ void MakeShares(const MlaSchedule& schedule, MlaShares& shares) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  int sum = 0;
  if (t < kMaxSplitRows) {
    sum = t < schedule.m ? schedule.rows[schedule.RowAt(t)].position / 64 + 1 : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += before;
    }
    if (lane == 31) shares.warp_sums[t / 32] = sum;
  }
  __syncthreads();
  if (t < schedule.m) {
    for (int warp = 0; warp < t / 32; ++warp) sum += shares.warp_sums[warp];
    shares.first_block[t + 1] = sum;
    if (t == 0) shares.first_block[0] = 0;
    if (t == schedule.m - 1) {
      const int share = (sum + schedule.groups - 1) / schedule.groups;
      constexpr int kWhole = kMlaLongSegmentTokens / 64;
      shares.share = share >= kWhole ? (share + kWhole - 1) / kWhole * kWhole : share;
    }
  }
  __syncthreads();
}

// One group's work in order.
class MlaWorkList {
 public:
  // `shares` is only read if schedule.split.
  __device__ __forceinline__ MlaWorkList(const MlaSchedule& schedule, int group,
                                         const MlaShares& shares)
      : schedule_(schedule), shares_(shares), group_(group), place_(group) {
    if (!schedule.split) return;
    const int begin = group * shares.share;
    int low = 0, high = schedule.m;  // the last place that starts at or before `begin`
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (shares.first_block[middle] <= begin ? low : high) = middle;
    }
    place_ = low;
  }

  __device__ __forceinline__ bool Next(MlaWork& work) {
    while (place_ < schedule_.m) {
      work.row = schedule_.split ? schedule_.RowAt(place_) : place_;
      work.at = schedule_.rows[work.row];
      const int size = schedule_.SegmentBlocks(work.at.position);
      work.segments = (work.at.position / 64 + size) / size;
      work.begin = 0;
      work.end = work.segments;
      if (!schedule_.split) {
        place_ += schedule_.groups;
        return true;
      }
      const int first = shares_.first_block[place_++];
      const int begin = group_ * shares_.share, end = begin + shares_.share;
      if (first >= end) return false;
      work.begin = first >= begin ? 0 : (begin - first + size - 1) / size;
      work.end = min(work.segments, (end - first + size - 1) / size);
      if (work.begin < work.end) return true;
    }
    return false;
  }

 private:
  const MlaSchedule& schedule_;
  const MlaShares& shares_;
  const int group_;
  int place_;
};

// Whether the segments of the row at a place were computed by more than one group.
__device__ __forceinline__ bool IsShared(const MlaSchedule& schedule, const MlaShares& shares,
                                         int place) {
  const int size = schedule.SegmentBlocks(schedule.rows[schedule.RowAt(place)].position);
  const int first = shares.first_block[place], blocks = shares.first_block[place + 1] - first;
  const int last = first + (blocks - 1) / size * size;
  return first / shares.share != last / shares.share;
}

}  // namespace moebius::kernels::cuda
