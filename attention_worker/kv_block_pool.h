#pragma once

// The latent cache: a fixed number of blocks of 64 tokens, each holding the rows of all layers, and
// the exact account of who holds which. Memory is [layers][num_blocks][64][latent_dim] BF16,
// allocated once (and not touched: rows are written before they are read). A block number means the
// same block in every layer.
//
// Threading: the account belongs to the actor's loop. Compute work reads and writes cache rows of
// the blocks that its step was planned with; a block freed during a step is handed out again only
// when the next step is planned, so the two never meet.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/float_formats.h"
#include "kernels/attention.h"

namespace moebius::attention_worker {

// Blocks that `tokens` cache rows of one sequence occupy.
constexpr int64_t BlocksForTokens(int64_t tokens) {
  return (tokens + kernels::kCacheBlockTokens - 1) / kernels::kCacheBlockTokens;
}

class KvBlockPool {
 public:
  // REQUIRES: num_blocks > 0; num_layers and latent_dim >= 0 (0: an account without memory).
  KvBlockPool(int32_t num_blocks, int64_t num_layers, int64_t latent_dim);
  KvBlockPool(const KvBlockPool&) = delete;
  KvBlockPool& operator=(const KvBlockPool&) = delete;

  // Appends one free block to `table`; false (and nothing appended) when none is free.
  bool Allocate(std::vector<int32_t>& table);
  // Takes back every block of `table` at once. The numbers stay in the vector: a step in flight may
  // still read it. REQUIRES: all of them are allocated; call once per hand-out.
  void Free(const std::vector<int32_t>& table);

  int32_t free_blocks() const { return static_cast<int32_t>(free_.size()); }
  int32_t used_blocks() const { return num_blocks_ - free_blocks(); }
  int32_t total_blocks() const { return num_blocks_; }

  // One layer's blocks: [num_blocks, 64, latent_dim].
  Bf16* LayerCache(int64_t layer) {
    return memory_.get() + static_cast<size_t>(layer) * layer_stride_;
  }
  size_t memory_bytes() const { return memory_size_ * sizeof(Bf16); }

 private:
  int32_t num_blocks_;
  size_t layer_stride_;  // elements
  size_t memory_size_;   // elements
  std::unique_ptr<Bf16[], void (*)(Bf16*)> memory_;
  std::vector<int32_t> free_;    // a stack: the block freed last is the warmest
  std::vector<bool> allocated_;  // per block
};

}  // namespace moebius::attention_worker
