// Goal: the pool hands out what fits, never more than it has, and gets everything back.

#include "runtime/buffer_pool.h"

#include <cstring>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::runtime {
namespace {

TEST(BufferPool, ServesTheSmallestClassThatFitsAndThenLargerOnes) {
  BufferPool pool({{100, 2}, {1000, 1}});
  std::optional<Buffer> a = pool.Acquire(50);
  std::optional<Buffer> b = pool.Acquire(100);
  ASSERT_TRUE(a && b);
  EXPECT_EQ(a->capacity(), 100u);
  EXPECT_EQ(a->size(), 50u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a->data()) % 64, 0u);
  std::optional<Buffer> c = pool.Acquire(10);
  ASSERT_TRUE(c);
  EXPECT_EQ(c->capacity(), 1000u);
  EXPECT_FALSE(pool.Acquire(10)) << "full is an answer";
  EXPECT_FALSE(pool.Acquire(1001));
  a.reset();
  EXPECT_TRUE(pool.Acquire(10));
  EXPECT_EQ(pool.in_use(), 2u);
}

TEST(Buffer, MovesWithoutLosingItsPlace) {
  BufferPool pool({{64, 2}});
  Buffer a = *pool.Acquire(10);
  std::byte* data = a.data();
  Buffer b = std::move(a);
  EXPECT_EQ(b.data(), data);
  EXPECT_TRUE(a.empty());
  b = *pool.Acquire(20);
  EXPECT_EQ(pool.in_use(), 1u) << "what was assigned over went back";
}

TEST(BufferPool, DistinctBuffersDoNotOverlap) {
  BufferPool pool({{100, 50}});
  std::vector<Buffer> buffers;
  for (int i = 0; i < 50; ++i) {
    buffers.push_back(*pool.Acquire(100));
    std::memset(buffers.back().data(), i, 100);
  }
  for (int i = 0; i < 50; ++i) {
    for (std::byte value : buffers[i].bytes()) ASSERT_EQ(value, std::byte(i));
  }
}

}  // namespace
}  // namespace moebius::runtime
