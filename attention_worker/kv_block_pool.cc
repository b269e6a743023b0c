#include "attention_worker/kv_block_pool.h"

#include <cstdlib>

#include "base/check.h"

namespace moebius::attention_worker {
namespace {

void FreeMemory(Bf16* memory) { std::free(memory); }

Bf16* AllocateUntouched(size_t elements) {
  if (elements == 0) return nullptr;
  // Whole cache lines; aligned_alloc wants the size to be a multiple of the alignment.
  const size_t bytes = (elements * sizeof(Bf16) + 63) / 64 * 64;
  auto* memory = static_cast<Bf16*>(std::aligned_alloc(64, bytes));
  CHECK(memory != nullptr);
  return memory;
}

}  // namespace

KvBlockPool::KvBlockPool(int32_t num_blocks, int64_t num_layers, int64_t latent_dim)
    : num_blocks_(num_blocks),
      layer_stride_(static_cast<size_t>(num_blocks) * kernels::kCacheBlockTokens * latent_dim),
      memory_size_(layer_stride_ * num_layers),
      memory_(AllocateUntouched(memory_size_), FreeMemory),
      allocated_(num_blocks, false) {
  CHECK_GT(num_blocks, 0);
  free_.reserve(num_blocks);
  for (int32_t block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

bool KvBlockPool::Allocate(std::vector<int32_t>& table) {
  if (free_.empty()) return false;
  const int32_t block = free_.back();
  free_.pop_back();
  CHECK(!allocated_[block]);
  allocated_[block] = true;
  table.push_back(block);
  return true;
}

void KvBlockPool::Free(const std::vector<int32_t>& table) {
  for (auto block = table.rbegin(); block != table.rend(); ++block) {
    CHECK(allocated_[*block]);
    allocated_[*block] = false;
    free_.push_back(*block);
  }
}

}  // namespace moebius::attention_worker
