#pragma once

// One owner for a handle of a C interface. Traits gives the type, its "nothing" value and how to
// close it:
//   struct FdTraits { using Type = int; static constexpr int kInvalid = -1; static void Close(int
//   fd); }; using UniqueFd = UniqueHandle<FdTraits>;
// Not thread-safe.

#include <unistd.h>

#include <utility>

namespace moebius {

template <typename Traits>
class UniqueHandle {
 public:
  using Type = typename Traits::Type;
  UniqueHandle() = default;
  explicit UniqueHandle(Type handle) : handle_(handle) {}
  UniqueHandle(UniqueHandle&& other) noexcept : handle_(other.release()) {}
  UniqueHandle& operator=(UniqueHandle&& other) noexcept {
    reset(other.release());
    return *this;
  }
  UniqueHandle(const UniqueHandle&) = delete;
  UniqueHandle& operator=(const UniqueHandle&) = delete;
  ~UniqueHandle() { reset(); }

  Type get() const { return handle_; }
  explicit operator bool() const { return handle_ != Traits::kInvalid; }
  Type release() { return std::exchange(handle_, Traits::kInvalid); }
  void reset(Type handle = Traits::kInvalid) {
    const Type old = std::exchange(handle_, handle);
    if (old != Traits::kInvalid && old != handle) Traits::Close(old);
  }

 private:
  Type handle_ = Traits::kInvalid;
};

struct FdTraits {
  using Type = int;
  static constexpr int kInvalid = -1;
  static void Close(int fd) { ::close(fd); }
};
using UniqueFd = UniqueHandle<FdTraits>;

}  // namespace moebius
