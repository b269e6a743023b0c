#pragma once

// XXH3 from libxxhash behind two names, so that everything which is compared across processes
// (frame checksums, manifests, row digests) is hashed in the same way. Pure, any thread.

#include <cstddef>
#include <cstdint>

#include "xxhash.h"

namespace moebius {

inline uint64_t Hash64(const void* data, size_t size, uint64_t seed = 0) {
  return XXH3_64bits_withSeed(data, size, seed);
}

struct Hash128Value {
  uint64_t low = 0;
  uint64_t high = 0;
  friend bool operator==(const Hash128Value&, const Hash128Value&) = default;
};

inline Hash128Value Hash128(const void* data, size_t size, uint64_t seed = 0) {
  const XXH128_hash_t hash = XXH3_128bits_withSeed(data, size, seed);
  return Hash128Value{hash.low64, hash.high64};
}

}  // namespace moebius
