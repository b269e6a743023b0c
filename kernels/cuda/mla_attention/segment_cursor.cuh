#pragma once

// Where a warpgroup stands among the segments that its CTA computes, over the borders of rows: the
// two that compute keep the tensor cores busy with the next segment while one goes to memory.

#include "kernels/cuda/mla_attention/schedule.cuh"

namespace moebius::kernels::cuda {

class SegmentCursor {
 public:
  __device__ __forceinline__ SegmentCursor(const MlaSchedule& schedule, int group,
                                           const MlaShares& shares)
      : schedule_(schedule), list_(schedule, group, shares) {}

  // To the next segment; false if there is none.
  __device__ __forceinline__ bool Next() {
    if (segment_ + 1 < work_.end) {
      ++segment_;
    } else {
      if (!list_.Next(work_)) return false;
      segment_ = work_.begin;
    }
    const int size = schedule_.SegmentBlocks(work_.at.position);
    const int left = work_.at.position / 64 + 1 - segment_ * size;  // blocks of the context
    blocks_ = min(size, left);
    last_of_last_ = left > size ? 63 : work_.at.position % 64;
    return true;
  }

  __device__ const MlaWork& work() const { return work_; }
  __device__ int segment() const { return segment_; }
  __device__ int blocks() const { return blocks_; }
  // The last position of a block of the segment that the row sees.
  __device__ int LastOf(int block) const { return block + 1 == blocks_ ? last_of_last_ : 63; }
  __device__ bool FirstOfWork() const { return segment_ == work_.begin; }
  __device__ bool LastOfWork() const { return segment_ + 1 == work_.end; }

 private:
  const MlaSchedule& schedule_;
  MlaWorkList list_;
  MlaWork work_ = {};
  int segment_ = 0, blocks_ = 0, last_of_last_ = 0;
};

}  // namespace moebius::kernels::cuda
