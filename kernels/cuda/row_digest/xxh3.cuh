#pragma once

// XXH3-64 with a seed, from the algorithm's public specification (xxHash, doc/xxhash_spec.md), for
// inputs of an even number of bytes at 2-byte aligned addresses. Up to 240 bytes it is one chain
// (ShortDigest). Longer inputs are what makes it parallel: eight 64-bit lanes each sum one product
// per 64-byte stripe, and only every sixteenth stripe a lane is scrambled, so the sums of each
// kilobyte block are independent of all that came before.

#include <cstdint>

namespace moebius::kernels::cuda::xxh3 {

inline constexpr uint64_t kPrime32_1 = 0x9E3779B1u;
inline constexpr uint64_t kPrime32_2 = 0x85EBCA77u;
inline constexpr uint64_t kPrime32_3 = 0xC2B2AE3Du;
inline constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87u;
inline constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4Fu;
inline constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9u;
inline constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63u;
inline constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5u;
inline constexpr uint64_t kPrimeAvalanche = 0x165667919E3779F9u;
inline constexpr uint64_t kPrimeShort = 0x9FB21C651E98DF25u;

inline constexpr int kShortBytes = 240;
inline constexpr int kStripeBytes = 64;
inline constexpr int kStripeLanes = 8;
inline constexpr int kBlockBytes = 1024;
inline constexpr int kBlockStripes = kBlockBytes / kStripeBytes;

// The default secret, 192 bytes, as little-endian words.
inline constexpr int kSecretWords = 24;
static __constant__ const uint64_t kSecret[kSecretWords] = {
    0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u,
    0x78e5c0cc4ee679cbu, 0x2172ffcc7dd05a82u, 0x8e2443f7744608b8u, 0x4c263a81e69035e0u,
    0xcb00c391bb52283cu, 0xa32e531b8b65d088u, 0x4ef90da297486471u, 0xd8acdea946ef1938u,
    0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au, 0x647378d9c97e9fc8u,
    0xc3ebd33483acc5eau, 0xeb6313faffa081c5u, 0x49daf0b751dd0d17u, 0x9e68d429265516d3u,
    0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu,
};

// Word i of the secret that a seed gives long inputs.
__device__ __forceinline__ uint64_t SeededSecretWord(int i, uint64_t seed) {
  return i % 2 == 0 ? kSecret[i] + seed : kSecret[i] - seed;
}

// Eight bytes of a secret from any byte.
__device__ __forceinline__ uint64_t SecretAt(const uint64_t* secret, int byte) {
  const int word = byte / 8, shift = byte % 8 * 8;
  return shift == 0 ? secret[word] : (secret[word] >> shift) | (secret[word + 1] << (64 - shift));
}

__device__ __forceinline__ uint64_t Read64(const uint16_t* from) {
  return static_cast<uint64_t>(from[0]) | (static_cast<uint64_t>(from[1]) << 16) |
         (static_cast<uint64_t>(from[2]) << 32) | (static_cast<uint64_t>(from[3]) << 48);
}
__device__ __forceinline__ uint32_t Read32(const uint16_t* from) {
  return static_cast<uint32_t>(from[0]) | (static_cast<uint32_t>(from[1]) << 16);
}

// The two halves of the 128-bit product, folded.
__device__ __forceinline__ uint64_t FoldedProduct(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

__device__ __forceinline__ uint64_t Avalanche(uint64_t hash) {
  hash ^= hash >> 37;
  hash *= kPrimeAvalanche;
  return hash ^ (hash >> 32);
}

__device__ __forceinline__ uint64_t RotateLeft(uint64_t x, int bits) {
  return (x << bits) | (x >> (64 - bits));
}
__device__ __forceinline__ uint64_t SwapBytes(uint64_t x) {
  uint64_t swapped = 0;
  for (int i = 0; i < 8; ++i) swapped |= ((x >> (8 * i)) & 0xff) << (56 - 8 * i);
  return swapped;
}

// Sixteen bytes of input against sixteen of the secret.
__device__ __forceinline__ uint64_t Mix16(const uint16_t* from, const uint64_t* secret, int byte,
                                          uint64_t seed) {
  return FoldedProduct(Read64(from) ^ (SecretAt(secret, byte) + seed),
                       Read64(from + 4) ^ (SecretAt(secret, byte + 8) - seed));
}

// The hash of `halves` 2-byte values. REQUIRES: 1 <= halves <= kShortBytes / 2.
__device__ inline uint64_t ShortDigest(const uint16_t* from, int halves, const uint64_t* secret,
                                       uint64_t seed) {
  const uint64_t length = 2 * static_cast<uint64_t>(halves);
  if (length < 4) {
    const uint32_t first = from[0] & 0xffu, last = from[0] >> 8;
    const uint64_t mixed =
        (first << 16) | (last << 24) | last | (static_cast<uint32_t>(length) << 8);
    uint64_t hash = mixed ^ (((secret[0] ^ (secret[0] >> 32)) & 0xffffffffu) + seed);
    hash ^= hash >> 33;
    hash *= kPrime64_2;
    hash ^= hash >> 29;
    hash *= kPrime64_3;
    return hash ^ (hash >> 32);
  }
  if (length <= 8) {
    seed ^= SwapBytes(seed & 0xffffffffu);
    const uint64_t both = Read32(from + halves - 2) + (static_cast<uint64_t>(Read32(from)) << 32);
    uint64_t hash = both ^ ((secret[1] ^ secret[2]) - seed);
    hash ^= RotateLeft(hash, 49) ^ RotateLeft(hash, 24);
    hash *= kPrimeShort;
    hash ^= (hash >> 35) + length;
    hash *= kPrimeShort;
    return hash ^ (hash >> 28);
  }
  if (length <= 16) {
    const uint64_t low = Read64(from) ^ ((secret[3] ^ secret[4]) + seed);
    const uint64_t high = Read64(from + halves - 4) ^ ((secret[5] ^ secret[6]) - seed);
    return Avalanche(length + SwapBytes(low) + high + FoldedProduct(low, high));
  }
  uint64_t sum = length * kPrime64_1;
  if (length <= 128) {
    // From both ends inwards, sixteen bytes at a time.
    for (int i = (static_cast<int>(length) - 1) / 32; i >= 0; --i) {
      sum += Mix16(from + 8 * i, secret, 32 * i, seed);
      sum += Mix16(from + halves - 8 * (i + 1), secret, 32 * i + 16, seed);
    }
    return Avalanche(sum);
  }
  const int rounds = static_cast<int>(length) / 16;
  for (int i = 0; i < 8; ++i) sum += Mix16(from + 8 * i, secret, 16 * i, seed);
  sum = Avalanche(sum);
  for (int i = 8; i < rounds; ++i) sum += Mix16(from + 8 * i, secret, 16 * (i - 8) + 3, seed);
  sum += Mix16(from + halves - 8, secret, 136 - 17, seed);
  return Avalanche(sum);
}

// Where lane i of the long form begins.
__device__ __forceinline__ uint64_t InitialLane(int i) {
  switch (i) {
    case 0:
      return kPrime32_3;
    case 1:
      return kPrime64_1;
    case 2:
      return kPrime64_2;
    case 3:
      return kPrime64_3;
    case 4:
      return kPrime64_4;
    case 5:
      return kPrime32_2;
    case 6:
      return kPrime64_5;
    default:
      return kPrime32_1;
  }
}

// What a lane's eight bytes of a stripe add to it; the bytes themselves are added to its neighbour
// (lane ^ 1).
__device__ __forceinline__ uint64_t LaneProduct(uint64_t data, uint64_t secret) {
  const uint64_t keyed = data ^ secret;
  return (keyed & 0xffffffffu) * (keyed >> 32);
}

// After each whole block.
__device__ __forceinline__ uint64_t Scramble(uint64_t lane, uint64_t secret) {
  return (lane ^ (lane >> 47) ^ secret) * kPrime32_1;
}

}  // namespace moebius::kernels::cuda::xxh3
