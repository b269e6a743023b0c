// Goal: merging follows rank, then position, and equals the obvious quadratic algorithm on random
// vocabularies; a megabyte in one piece is fast enough.

#include "model/bpe.h"

#include <numeric>
#include <string>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::model {
namespace {

std::array<TokenId, 256> Bytes() {
  std::array<TokenId, 256> ids{};
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

using Ids = std::vector<TokenId>;

Ids Encode(const std::vector<BytePairEncoder::Merge>& merges, const std::string& piece) {
  Ids ids;
  BytePairEncoder(Bytes(), merges).Encode(piece, ids);
  return ids;
}

// The definition: among all adjacent pairs take the lowest rank, the leftmost of equals.
Ids EncodeByDefinition(const std::vector<BytePairEncoder::Merge>& merges,
                       const std::string& piece) {
  Ids ids;
  for (const char c : piece) ids.push_back(static_cast<unsigned char>(c));
  while (true) {
    size_t best_rank = merges.size(), best_at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank].left == ids[i] && merges[rank].right == ids[i + 1]) {
          best_rank = rank;
          best_at = i;
        }
      }
    }
    if (best_rank == merges.size()) return ids;
    ids[best_at] = merges[best_rank].merged;
    ids.erase(ids.begin() + static_cast<int64_t>(best_at) + 1);
  }
}

TEST(Bpe, LowestRankFirstThenLeftmost) {
  const std::vector<BytePairEncoder::Merge> merges = {{'b', 'c', 300}, {'a', 'b', 301}};
  EXPECT_EQ(Encode(merges, "abc"), (Ids{'a', 300}));
  EXPECT_EQ(Encode(merges, "abab"), (Ids{301, 301}));
  EXPECT_EQ(Encode({{'a', 'a', 300}}, "aaaaa"), (Ids{300, 300, 'a'}));
  EXPECT_EQ(Encode({}, "xy"), (Ids{'x', 'y'}));
  EXPECT_EQ(Encode(merges, ""), Ids{});
}

TEST(Bpe, EqualsTheDefinitionOnRandomVocabularies) {
  Prng prng(5);
  for (int round = 0; round < 200; ++round) {
    std::vector<BytePairEncoder::Merge> merges;
    std::vector<TokenId> known = {'a', 'b', 'c'};
    for (TokenId id = 300; id < 312; ++id) {
      const TokenId left = known[prng.Below(known.size())], right = known[prng.Below(known.size())];
      bool listed = false;
      for (const auto& merge : merges) listed |= merge.left == left && merge.right == right;
      if (listed) continue;
      merges.push_back({left, right, id});
      known.push_back(id);
    }
    for (int text = 0; text < 20; ++text) {
      std::string piece;
      for (uint64_t i = prng.Below(40); i > 0; --i) piece.push_back("abc"[prng.Below(3)]);
      EXPECT_EQ(Encode(merges, piece), EncodeByDefinition(merges, piece)) << piece;
    }
  }
}

TEST(Bpe, AMegabyteInOnePiece) {
  std::vector<BytePairEncoder::Merge> merges = {{'a', 'a', 300}};
  for (TokenId id = 301; id < 316; ++id) merges.push_back({id - 1, id - 1, id});
  const Ids ids = Encode(merges, std::string(1 << 20, 'a'));
  EXPECT_EQ(ids, Ids(16, 315));
}

}  // namespace
}  // namespace moebius::model
