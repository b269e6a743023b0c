// Goal: buffers are aligned, distinct, bounded, and come back exactly once, from any thread.

#include "runtime/buffer_pool.h"

#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::runtime {
namespace {

TEST(BufferPool, ServesTheSmallestClassThatFitsAndThenALargerOne) {
  BufferPool pool({{100, 1}, {1000, 2}});
  EXPECT_EQ(pool.max_buffer_bytes(), 1000u);
  std::vector<Buffer> held;
  for (size_t capacity : {100, 1000, 1000}) {
    std::optional<Buffer> buffer = pool.Acquire(50);
    ASSERT_TRUE(buffer.has_value());
    EXPECT_EQ(buffer->size(), 50u);
    EXPECT_EQ(buffer->capacity(), capacity);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    held.push_back(std::move(*buffer));
  }
  EXPECT_FALSE(pool.Acquire(1).has_value());
  EXPECT_FALSE(pool.Acquire(1001).has_value());
  EXPECT_EQ(pool.in_use(), 3u);
  // Whole capacities are writable without touching a neighbour.
  for (size_t i = 0; i < held.size(); ++i) {
    held[i].resize(held[i].capacity());
    std::memset(held[i].data(), static_cast<int>(i + 1), held[i].size());
  }
  for (size_t i = 0; i < held.size(); ++i) {
    for (std::byte b : held[i].bytes()) ASSERT_EQ(b, std::byte(i + 1));
  }
  held.clear();
  EXPECT_EQ(pool.in_use(), 0u);
  EXPECT_EQ(pool.releases(), 3u);
}

TEST(BufferPool, MovingABufferGivesItBackOnce) {
  BufferPool pool({{64, 2}});
  Buffer first = *pool.Acquire(10);
  Buffer moved = std::move(first);
  EXPECT_EQ(pool.in_use(), 1u);
  moved = *pool.Acquire(20);  // the one it held returns
  EXPECT_EQ(pool.in_use(), 1u);
  EXPECT_EQ(moved.size(), 20u);
  Buffer& alias = moved;
  moved = std::move(alias);
  EXPECT_EQ(moved.size(), 20u);
  moved = Buffer();
  EXPECT_EQ(pool.in_use(), 0u);
}

TEST(BufferPool, BuffersMayBeReleasedOnOtherThreads) {
  BufferPool pool({{64, 8}});
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&pool] {
      for (int i = 0; i < 2000; ++i) {
        if (std::optional<Buffer> buffer = pool.Acquire(64)) buffer->data()[0] = std::byte{1};
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.in_use(), 0u);
}

}  // namespace
}  // namespace moebius::runtime
