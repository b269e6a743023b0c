#pragma once

// Monotonic time as the runtime sees it. Actors never read a clock: they get Context::Now().

#include <chrono>
#include <cstdint>

namespace moebius::runtime {

using Duration = std::chrono::nanoseconds;

// Nanoseconds since an arbitrary start of this process (or simulation). Comparable within one node
// only.
struct TimePoint {
  int64_t ns = 0;
  friend constexpr auto operator<=>(TimePoint, TimePoint) = default;
  friend constexpr TimePoint operator+(TimePoint t, Duration d) { return {t.ns + d.count()}; }
  friend constexpr Duration operator-(TimePoint a, TimePoint b) { return Duration(a.ns - b.ns); }
};

class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimePoint Now() const = 0;
};

}  // namespace moebius::runtime
