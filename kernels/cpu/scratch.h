#pragma once

// A buffer that only grows: the first calls of a shape allocate, later ones do not.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace moebius::kernels::cpu {

// Uninitialised storage for trivial T, 64-byte aligned. Not thread-safe.
template <typename T>
class Scratch {
 public:
  // At least `count` elements; what an earlier call returned is invalid if this one must grow.
  T* Reserve(int64_t count) {
    if (count > capacity_) {
      storage_.reset(static_cast<T*>(
          ::operator new (static_cast<size_t>(count) * sizeof(T), std::align_val_t{kAlignment})));
      capacity_ = count;
    }
    return storage_.get();
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(T* data) const { ::operator delete (data, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<T, Free> storage_;
  int64_t capacity_ = 0;
};

}  // namespace moebius::kernels::cpu
