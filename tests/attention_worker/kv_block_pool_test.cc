#include "attention_worker/kv_block_pool.h"

#include <algorithm>
#include <set>
#include <vector>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::attention_worker {
namespace {

TEST(KvBlockPoolTest, HandsOutEachBlockOnceAndRefusesWhenEmpty) {
  KvBlockPool pool(5, 0, 0);
  std::vector<int32_t> table;
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(pool.Allocate(table));
  EXPECT_FALSE(pool.Allocate(table));
  EXPECT_EQ(table.size(), 5u);
  EXPECT_EQ(std::set<int32_t>(table.begin(), table.end()), (std::set<int32_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(pool.free_blocks(), 0);
  EXPECT_EQ(pool.used_blocks(), 5);
  pool.Free(table);
  EXPECT_EQ(pool.free_blocks(), 5);
}

TEST(KvBlockPoolTest, FreedNumbersStayReadable) {
  KvBlockPool pool(2, 0, 0);
  std::vector<int32_t> table;
  ASSERT_TRUE(pool.Allocate(table));
  const int32_t block = table[0];
  pool.Free(table);
  ASSERT_EQ(table.size(), 1u);
  EXPECT_EQ(table[0], block);
}

TEST(KvBlockPoolTest, RandomUseBalances) {
  KvBlockPool pool(37, 0, 0);
  Prng prng(1);
  std::vector<std::vector<int32_t>> holders(8);
  for (int i = 0; i < 20000; ++i) {
    std::vector<int32_t>& holder = holders[prng.Below(holders.size())];
    if (prng.Below(4) == 0) {
      pool.Free(holder);
      holder.clear();
    } else {
      pool.Allocate(holder);
    }
    std::set<int32_t> held;
    size_t sum = 0;
    for (const auto& h : holders) {
      held.insert(h.begin(), h.end());
      sum += h.size();
    }
    ASSERT_EQ(held.size(), sum) << "a block has two holders";
    ASSERT_EQ(pool.used_blocks(), static_cast<int32_t>(sum));
  }
}

TEST(KvBlockPoolTest, MemoryIsPerLayerAndAligned) {
  KvBlockPool pool(3, 2, 40);
  EXPECT_EQ(pool.memory_bytes(), 2u * 3 * 64 * 40 * 2);
  EXPECT_EQ(pool.LayerCache(1) - pool.LayerCache(0), 3 * 64 * 40);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(pool.LayerCache(0)) % 64, 0u);
}

TEST(KvBlockPoolTest, BlocksForTokensRoundsUp) {
  EXPECT_EQ(BlocksForTokens(0), 0);
  EXPECT_EQ(BlocksForTokens(1), 1);
  EXPECT_EQ(BlocksForTokens(64), 1);
  EXPECT_EQ(BlocksForTokens(65), 2);
}

TEST(KvBlockPoolDeathTest, FreeingTwiceIsABug) {
  KvBlockPool pool(2, 0, 0);
  std::vector<int32_t> table;
  ASSERT_TRUE(pool.Allocate(table));
  pool.Free(table);
  EXPECT_DEATH(pool.Free(table), "CHECK failed");
}

}  // namespace
}  // namespace moebius::attention_worker
