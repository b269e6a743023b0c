#pragma once

// The floating-point modes that the kernels' bits are defined in: round to nearest, subnormals kept
// (no flush to zero, no denormals are zero), no traps. A host program or library may have left the
// thread in another mode, so every operation enters through this guard, on every thread.

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace moebius::kernels::cpu {

class FloatEnvironment {
 public:
#if defined(__x86_64__)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(kMode); }
  ~FloatEnvironment() { _mm_setcsr(saved_); }
#else
  FloatEnvironment() = default;
#endif
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint32_t kMode = 0x1F80;  // all exceptions masked, nearest, FTZ and DAZ off
  uint32_t saved_;
#endif
};

}  // namespace moebius::kernels::cpu
