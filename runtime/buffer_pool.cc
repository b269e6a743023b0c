#include "runtime/buffer_pool.h"

#include <cstring>
#include <utility>

#include "base/check.h"

namespace moebius::runtime {
namespace {
constexpr size_t kAlignment = 64;

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
}  // namespace

Buffer::Buffer(Buffer&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)),
      entry_(other.entry_),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      capacity_(std::exchange(other.capacity_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    if (pool_ != nullptr) pool_->Release(entry_);
    pool_ = std::exchange(other.pool_, nullptr);
    entry_ = other.entry_;
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    capacity_ = std::exchange(other.capacity_, 0);
  }
  return *this;
}

Buffer::~Buffer() {
  if (pool_ != nullptr) pool_->Release(entry_);
}

void Buffer::resize(size_t size) {
  CHECK_LE(size, capacity_);
  size_ = size;
}

BufferPool::BufferPool(std::vector<BufferClass> classes, std::optional<std::byte> fill)
    : classes_(std::move(classes)), fill_(fill) {
  CHECK(!classes_.empty());
  size_t previous = 0;
  for (const BufferClass& size_class : classes_) {
    CHECK_GT(size_class.bytes, previous);
    CHECK_GT(size_class.count, 0u);
    previous = size_class.bytes;
  }
  free_.resize(classes_.size());
  for (uint32_t c = 0; c < classes_.size(); ++c) {
    const size_t stride = RoundUp(classes_[c].bytes);
    // Not zeroed: a page that no buffer has used yet costs nothing.
    slabs_.push_back(
        std::make_unique_for_overwrite<std::byte[]>(stride * classes_[c].count + kAlignment));
    auto* base =
        reinterpret_cast<std::byte*>(RoundUp(reinterpret_cast<uintptr_t>(slabs_.back().get())));
    free_[c].reserve(classes_[c].count);
    for (uint32_t i = 0; i < classes_[c].count; ++i) {
      free_[c].push_back(static_cast<uint32_t>(entries_.size()));
      entries_.push_back(Entry{base + stride * i, c});
    }
  }
}

BufferPool::~BufferPool() { CHECK_EQ(in_use_, 0u); }

std::optional<Buffer> BufferPool::Acquire(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (uint32_t c = 0; c < classes_.size(); ++c) {
    if (classes_[c].bytes < bytes || free_[c].empty()) continue;
    const uint32_t entry = free_[c].back();
    free_[c].pop_back();
    ++in_use_;
    Buffer buffer(this, entry, entries_[entry].data, classes_[c].bytes);
    buffer.size_ = bytes;
    if (fill_) std::memset(buffer.data_, static_cast<int>(*fill_), buffer.capacity_);
    return buffer;
  }
  return std::nullopt;
}

size_t BufferPool::max_buffer_bytes() const { return classes_.back().bytes; }

uint32_t BufferPool::in_use() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return in_use_;
}

uint64_t BufferPool::releases() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return releases_;
}

void BufferPool::Release(uint32_t entry) {
  std::lock_guard<std::mutex> lock(mutex_);
  CHECK_GT(in_use_, 0u);
  --in_use_;
  ++releases_;
  free_[entries_[entry].size_class].push_back(entry);
}

}  // namespace moebius::runtime
