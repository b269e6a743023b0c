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
  // Segments of rows that groups share, for which the workspace has room; 0: rows are dealt out
  // whole, as they are where m > kMaxSplitRows.
  int slots;
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
  int first_slot;  // of the row, if it is shared
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
  // Whether rows are shared: their segments are written to slots, of which there may be too few.
  bool split;
  // The first slots of the two rows that the group has only a part of: the one that began in the
  // group before, and the one that goes on in the next.
  int first_slot[2];
};

// The sum of the values of the threads up to this one, of the first kMaxSplitRows. All threads of
// the block; contains a barrier.
__device__ __forceinline__ int SumUpTo(int value, int (&warp_sums)[kMaxSplitRows / 32]) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  if (t < kMaxSplitRows) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(~0u, value, distance);
      if (lane >= distance) value += before;
    }
    if (lane == 31) warp_sums[t / 32] = value;
  }
  __syncthreads();
  if (t < kMaxSplitRows)
    for (int warp = 0; warp < t / 32; ++warp) value += warp_sums[warp];
  return value;
}

// Fills `shares` for a group; first_slots, if not null, with the first slot of each place that has
// a shared row, else -1. All threads of the block (at least kMaxSplitRows); ends with a barrier.
__device__ __forceinline__ void MakeShares(const MlaSchedule& schedule, int group,
                                           MlaShares& shares, int* first_slots = nullptr) {
  const int t = static_cast<int>(threadIdx.x);
  if (schedule.slots == 0) {
    if (t == 0) shares.split = false;
    __syncthreads();
    return;
  }
  const bool exists = t < schedule.m;
  const int position = exists ? schedule.rows[schedule.RowAt(t)].position : 0;
  const int blocks = exists ? position / 64 + 1 : 0;
  const int sum = SumUpTo(blocks, shares.warp_sums);
  if (exists) {
    shares.first_block[t + 1] = sum;
    if (t == 0) shares.first_block[0] = 0;
    if (t == schedule.m - 1) {
      const int share = (sum + schedule.groups - 1) / schedule.groups;
      constexpr int kWhole = kMlaLongSegmentTokens / 64;
      shares.share = share >= kWhole ? (share + kWhole - 1) / kWhole * kWhole : share;
    }
  }
  __syncthreads();
  // A segment belongs to the group in whose share its first block lies; a row is shared if its
  // first segment and its last belong to different ones.
  const int first = sum - blocks, share = shares.share;
  const int size = schedule.SegmentBlocks(position), last = first + (blocks - 1) / size * size;
  const bool shared = exists && first / share != last / share;
  const int segments = shared ? (blocks + size - 1) / size : 0;
  const int slots = SumUpTo(segments, shares.warp_sums), first_slot = slots - segments;
  if (shared) {
    const int begin = group * share;
    if (first < begin && begin < sum) shares.first_slot[0] = first_slot;
    if (begin <= first && first < begin + share) shares.first_slot[1] = first_slot;
  }
  if (t == schedule.m - 1) shares.split = slots <= schedule.slots;
  if (first_slots != nullptr && t < kMaxSplitRows) first_slots[t] = shared ? first_slot : -1;
  __syncthreads();
}

// One group's work in order.
class MlaWorkList {
 public:
  __device__ __forceinline__ MlaWorkList(const MlaSchedule& schedule, int group,
                                         const MlaShares& shares)
      : schedule_(schedule), shares_(shares), group_(group), place_(group) {
    if (!shares.split) return;
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
      work.row = shares_.split ? schedule_.RowAt(place_) : place_;
      work.at = schedule_.rows[work.row];
      const int size = schedule_.SegmentBlocks(work.at.position);
      work.segments = (work.at.position / 64 + size) / size;
      work.begin = 0;
      work.end = work.segments;
      if (!shares_.split) {
        place_ += schedule_.groups;
        return true;
      }
      const int first = shares_.first_block[place_++];
      const int begin = group_ * shares_.share, end = begin + shares_.share;
      if (first >= end) return false;
      work.begin = first >= begin ? 0 : (begin - first + size - 1) / size;
      work.end = min(work.segments, (end - first + size - 1) / size);
      work.first_slot = shares_.first_slot[work.begin == 0];
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

}  // namespace moebius::kernels::cuda
