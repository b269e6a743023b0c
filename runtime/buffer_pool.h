#pragma once

// Bounded pool of payload buffers. A Buffer is a move-only handle on one pool entry: destroying it
// gives the entry back. The pool allocates everything at construction (registered with the
// transport where that matters), so a step allocates nothing; an empty pool is an answer
// (back-pressure).
//
// Threading: Acquire from the node loop; a Buffer may be moved to a compute thread and released
// there (the free list is lock-protected). The pool must outlive its buffers (CHECKed at
// destruction).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "absl/types/span.h"

namespace moebius::runtime {

class BufferPool;

class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  // 64-byte aligned. size() is what the user set, at most capacity().
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  size_t capacity() const { return capacity_; }
  void resize(size_t size);  // REQUIRES: size <= capacity(); contents are kept, nothing is zeroed
  bool empty() const { return size_ == 0; }
  absl::Span<std::byte> span() const { return absl::MakeSpan(data_, size_); }
  absl::Span<const std::byte> bytes() const { return absl::MakeConstSpan(data_, size_); }

 private:
  friend class BufferPool;
  Buffer(BufferPool* pool, uint32_t entry, std::byte* data, size_t capacity)
      : pool_(pool), entry_(entry), data_(data), capacity_(capacity) {}
  BufferPool* pool_ = nullptr;
  uint32_t entry_ = 0;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

// One size class: `count` buffers of `bytes` each.
struct BufferClass {
  size_t bytes = 0;
  uint32_t count = 0;
};

class BufferPool {
 public:
  // REQUIRES: classes ascending in bytes, none empty. `fill` is for simulation: every byte of a
  // buffer is set to it when it is handed out, so that a byte that nobody wrote is the same in
  // every run of one fill and differs between two.
  explicit BufferPool(std::vector<BufferClass> classes,
                      std::optional<std::byte> fill = std::nullopt);
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  // A buffer of the smallest class that holds `bytes` and has a free entry (a larger class may
  // serve a smaller need), with size() == bytes; nullopt when none is free or bytes exceeds every
  // class.
  std::optional<Buffer> Acquire(size_t bytes);

  size_t max_buffer_bytes() const;
  // Buffers handed out and not yet returned: 0 when everything balances.
  uint32_t in_use() const;
  // Buffers returned so far: if it has not moved, an Acquire that failed fails again.
  uint64_t releases() const;

 private:
  friend class Buffer;
  void Release(uint32_t entry);
  struct Entry {
    std::byte* data;
    uint32_t size_class;
  };
  std::vector<BufferClass> classes_;
  std::optional<std::byte> fill_;
  std::vector<std::unique_ptr<std::byte[]>> slabs_;
  std::vector<Entry> entries_;
  mutable std::mutex mutex_;
  std::vector<std::vector<uint32_t>> free_;  // per class
  uint32_t in_use_ = 0;
  uint64_t releases_ = 0;
};

}  // namespace moebius::runtime
