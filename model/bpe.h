#pragma once

// Byte-pair encoding of one piece of text (Sennrich et al. 2016): start from single bytes, then
// merge the adjacent pair of lowest rank, the leftmost of equals, until no pair can be merged.
// O(n log n) in the piece's length. Immutable; Encode may be called from any thread.

#include <array>
#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "base/ids.h"

namespace moebius::model {

class BytePairEncoder {
 public:
  struct Merge {
    TokenId left = 0;
    TokenId right = 0;
    TokenId merged = 0;
  };

  // `byte_ids[b]` is the id of the single byte b; `merges` come in order of rank, best first. A
  // pair listed twice counts with its first rank.
  BytePairEncoder(const std::array<TokenId, 256>& byte_ids, const std::vector<Merge>& merges);

  // Appends the ids of `piece`.
  void Encode(absl::string_view piece, std::vector<TokenId>& ids) const;

 private:
  struct Target {
    uint32_t rank = 0;
    TokenId merged = 0;
  };
  const Target* Find(TokenId left, TokenId right) const;

  std::array<TokenId, 256> byte_ids_;
  absl::flat_hash_map<uint64_t, Target> merges_;
};

}  // namespace moebius::model
