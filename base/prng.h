#pragma once

// Deterministic random numbers. Two kinds, both with fixed, documented algorithms so that a seed
// means the same on every machine and build:
//   - CounterDraw: a pure function of its key; used where a draw must not depend on how many were
//     made before it (sampling token t of a request, reproducible replays).
//   - Prng: a sequence, for simulation, back-off jitter and tests.

#include <cstdint>

namespace moebius {

// SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection with full avalanche.
constexpr uint64_t Mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// 64 random bits that are a function of the arguments alone.
constexpr uint64_t CounterDraw(uint64_t seed, uint64_t stream, uint64_t counter) {
  return Mix64(Mix64(Mix64(seed) ^ stream) ^ counter);
}

// [0, 1) with 24 random bits, so that the result is exact in float.
constexpr float ToUnitFloat(uint64_t bits) {
  return static_cast<float>(bits >> 40) * (1.0f / 16777216.0f);
}

// SplitMix64 sequence. Copyable; not thread-safe.
class Prng {
 public:
  explicit constexpr Prng(uint64_t seed) : state_(seed) {}
  constexpr uint64_t Next() {
    const uint64_t out = Mix64(state_);
    state_ += 0x9E3779B97F4A7C15ull;
    return out;
  }
  // Uniform in [0, bound). REQUIRES: bound > 0. The bias of the multiply-shift is below bound/2^64.
  constexpr uint64_t Below(uint64_t bound) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(Next()) * bound) >> 64);
  }
  constexpr float Unit() { return ToUnitFloat(Next()); }

 private:
  uint64_t state_;
};

}  // namespace moebius
