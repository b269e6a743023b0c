#pragma once

// Replaces the global operator new of a test binary by one that counts. Include it in exactly one
// source of the binary (the definitions below are not inline, because replacements must not be).

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace moebius::testing_support {

// Allocations of every thread so far.
inline std::atomic<int64_t> allocations{0};

inline void* CountedAllocate(size_t size, size_t alignment) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  void* data = nullptr;
  const size_t at_least = alignment < sizeof(void*) ? sizeof(void*) : alignment;
  if (posix_memalign(&data, at_least, size == 0 ? 1 : size) != 0) std::abort();
  return data;
}

}  // namespace moebius::testing_support

void* operator new(size_t size) {
  return moebius::testing_support::CountedAllocate(size, alignof(std::max_align_t));
}
void* operator new[](size_t size) {
  return moebius::testing_support::CountedAllocate(size, alignof(std::max_align_t));
}
void* operator new(size_t size, std::align_val_t alignment) {
  return moebius::testing_support::CountedAllocate(size, static_cast<size_t>(alignment));
}
void* operator new[](size_t size, std::align_val_t alignment) {
  return moebius::testing_support::CountedAllocate(size, static_cast<size_t>(alignment));
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete(void* data, size_t) noexcept { std::free(data); }
void operator delete[](void* data, size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, size_t, std::align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, size_t, std::align_val_t) noexcept { std::free(data); }
