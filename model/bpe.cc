#include "model/bpe.h"

#include <algorithm>
#include <queue>
#include <tuple>

namespace moebius::model {
namespace {

uint64_t PairKey(TokenId left, TokenId right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

// A symbol of the piece being merged; symbols form a doubly linked list by index, and a symbol that
// was swallowed by its left neighbour has `id` kGone.
constexpr TokenId kGone = -1;
struct Symbol {
  TokenId id = 0;
  int32_t previous = -1;
  int32_t next = -1;
};

struct Candidate {
  uint32_t rank;
  int32_t position;  // of the left symbol
  TokenId left;      // what the pair was when the candidate was made; stale if it has changed
  TokenId right;
  TokenId merged;
  // The queue's top is the greatest: lowest rank, then leftmost.
  friend bool operator<(const Candidate& a, const Candidate& b) {
    return std::tie(a.rank, a.position) > std::tie(b.rank, b.position);
  }
};

}  // namespace

BytePairEncoder::BytePairEncoder(const std::array<TokenId, 256>& byte_ids,
                                 const std::vector<Merge>& merges)
    : byte_ids_(byte_ids) {
  merges_.reserve(merges.size());
  uint32_t rank = 0;
  for (const Merge& merge : merges) {
    merges_.emplace(PairKey(merge.left, merge.right), Target{rank++, merge.merged});
  }
}

const BytePairEncoder::Target* BytePairEncoder::Find(TokenId left, TokenId right) const {
  const auto it = merges_.find(PairKey(left, right));
  return it == merges_.end() ? nullptr : &it->second;
}

void BytePairEncoder::Encode(absl::string_view piece, std::vector<TokenId>& ids) const {
  if (piece.empty()) return;
  const int32_t count = static_cast<int32_t>(piece.size());
  std::vector<Symbol> symbols(piece.size());
  std::vector<Candidate> initial;
  for (int32_t i = 0; i < count; ++i) {
    symbols[i] = {byte_ids_[static_cast<unsigned char>(piece[i])], i - 1,
                  i + 1 < count ? i + 1 : -1};
  }
  const auto candidate = [&](int32_t position, Candidate* out) {
    if (position < 0 || symbols[position].next < 0) return false;
    const TokenId left = symbols[position].id, right = symbols[symbols[position].next].id;
    const Target* target = Find(left, right);
    if (target == nullptr) return false;
    *out = {target->rank, position, left, right, target->merged};
    return true;
  };
  Candidate made;
  for (int32_t i = 0; i < count; ++i) {
    if (candidate(i, &made)) initial.push_back(made);
  }
  std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(initial));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.position];
    if (left.id != best.left || left.next < 0 || symbols[left.next].id != best.right) continue;
    Symbol& right = symbols[left.next];
    left.id = best.merged;
    left.next = right.next;
    right.id = kGone;
    if (left.next >= 0) symbols[left.next].previous = best.position;
    if (candidate(left.previous, &made)) queue.push(made);
    if (candidate(best.position, &made)) queue.push(made);
  }
  for (int32_t i = 0; i >= 0; i = symbols[i].next) ids.push_back(symbols[i].id);
}

}  // namespace moebius::model
