// The row rule: an output row of the MLA core is a function of its own query, position and cache
// rows, wherever it stands, whatever stands beside it, and however CTAs share the work.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "tests/kernels/cuda/mla_attention_batch.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

// 600 positions of one sequence around the end of a segment, in one call, against the same rows in
// calls of `chunk` rows, standing `shift` places further on (cyclically). Some queries hold NaN and
// infinities: their bits count too. Buffers are made before a competing kernel starts, because to
// allocate would wait for its end.
class Whole {
 public:
  // Rows at positions from `first` on.
  explicit Whole(int64_t first)
      : first_(first),
        cache_({first + kRows}, 4, 5),
        out_(static_cast<size_t>(kRows * kRowValues)),
        q_(static_cast<size_t>(2 * kRows * kHeads * kDim)),
        rows_(static_cast<size_t>(2 * kRows)) {
    cache_.Upload();
    std::vector<Bf16> q = RandomQueries(kRows, kHeads, 6);
    std::vector<MlaRow> rows;
    for (int64_t row = 0; row < kRows; ++row) {
      if (row % 64 == 3) q[static_cast<size_t>(row * kHeads * kDim + 5)] = ToBf16(NAN);
      if (row % 64 == 9) q[static_cast<size_t>(row * kHeads * kDim + 700)] = ToBf16(-INFINITY);
      rows.push_back({static_cast<int32_t>(first + row), 0});
    }
    // Twice in a row, so that turned ones are a part of them.
    q.resize(2 * q.size());
    std::copy_n(q.begin(), q.size() / 2, q.begin() + static_cast<int64_t>(q.size() / 2));
    rows.resize(2 * rows.size());
    std::copy_n(rows.begin(), kRows, rows.begin() + kRows);
    q_.Upload(q);
    rows_.Upload(rows);
    Workspace(MlaAttentionWorkspaceBytesWithSegments(kRows, kHeads, first + kRows, 512));
    expected_ = Run(0, kRows, 0);
  }

  // Rows that differ, of kRows.
  int64_t Different(int64_t chunk, int64_t shift, int64_t segment_tokens = 0) {
    const std::vector<uint64_t> found = Run((kRows - shift) % kRows, chunk, segment_tokens);
    int64_t different = 0;
    for (int64_t row = 0; row < kRows; ++row) {
      different +=
          found[static_cast<size_t>((row + shift) % kRows)] != expected_[static_cast<size_t>(row)];
    }
    return different;
  }

  static constexpr int64_t kRows = 600, kHeads = 128, kRowValues = kHeads * kRank;

 private:
  // A hash for each of the kRows rows from `first` on.
  std::vector<uint64_t> Run(int64_t first, int64_t chunk, int64_t segment_tokens) {
    out_.Poison();
    MlaAttentionCoreParams params;
    params.num_heads = kHeads;
    params.softmax_scale = kScale;
    cache_.Fill(params);
    params.max_context = first_ + kRows;
    params.workspace = workspace->get();
    params.workspace_bytes = static_cast<int64_t>(workspace->count());
    for (int64_t row = 0; row < kRows; row += chunk) {
      params.m = std::min(chunk, kRows - row);
      params.q = q_.get() + (first + row) * kHeads * kDim;
      params.rows = rows_.get() + first + row;
      params.out = out_.get() + row * kRowValues;
      const absl::Status status = LaunchMlaAttentionWithSegments(params, segment_tokens, nullptr);
      EXPECT_TRUE(status.ok()) << status.ToString();
    }
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "MlaAttention");
    const std::vector<Bf16> out = out_.Download();
    std::vector<uint64_t> hashes;
    for (int64_t row = 0; row < kRows; ++row) {
      hashes.push_back(Hash64(&out[static_cast<size_t>(row * kRowValues)],
                              static_cast<size_t>(kRowValues) * sizeof(Bf16)));
    }
    return hashes;
  }

  const int64_t first_;
  Cache cache_;
  DeviceBuffer<Bf16> out_, q_;
  DeviceBuffer<MlaRow> rows_;
  std::vector<uint64_t> expected_;
};

TEST_F(MlaAttentionTest, ChunksOfACallGiveTheBitsOfTheWhole) {
  // One segment or two; from six long ones on to seven short ones; twelve and more, which are
  // merged in more than one step.
  for (const int64_t first : {1900, 5900, 11'700}) {
    Whole whole(first);
    int64_t compared = 0;
    for (const int64_t chunk : {1, 16, 63, 512}) {
      for (const int64_t shift : {0, 1, 233}) {
        const CompetingKernel competing;
        EXPECT_EQ(whole.Different(chunk, shift), 0) << "positions from " << first << ", calls of "
                                                    << chunk << " rows, " << shift << " places on";
        EXPECT_TRUE(competing.Runs());
        compared += Whole::kRows * Whole::kRowValues;
      }
    }
    std::printf("positions from %ld: %ld values compared\n", first, compared);
    EXPECT_GE(compared, 100'000'000);
    // A split that follows the batch is noticed.
    const int64_t different = whole.Different(16, 0, 512);
    std::printf("%ld of %ld rows differ with another split\n", different, Whole::kRows);
    EXPECT_GT(different, Whole::kRows / 2);
  }
}

// More segments of shared rows than the workspace has slots for: rows are dealt out whole instead.
TEST_F(MlaAttentionTest, ChunksOfMoreSegmentsThanSlotsGiveTheSameBits) {
  Whole whole(60'000);
  for (const int64_t chunk : {16, 40}) {  // 59 segments a row, 2,032 slots
    EXPECT_EQ(whole.Different(chunk, 0), 0) << "calls of " << chunk << " rows";
  }
}

TEST_F(MlaAttentionTest, AWorkspaceServesSmallerCalls) {
  for (const int64_t heads : {16, 64, 128}) {
    for (const int64_t context : {1, 4096, 6144, 6145, 131'072}) {
      for (const int64_t m : {1, 2, 15, 16, 66, 132, 256, 257, 4096}) {
        const int64_t bytes = MlaAttentionWorkspaceBytes(m, heads, context);
        EXPECT_LE(bytes, MlaAttentionWorkspaceBytes(m + 1, heads, context)) << m << " rows";
        EXPECT_LE(bytes, MlaAttentionWorkspaceBytes(m, heads, context + 1)) << context << " tokens";
        EXPECT_LE(bytes, int64_t{1} << 30);
      }
    }
  }
}

TEST_F(MlaAttentionTest, ARowHasTheSameBitsAmongAnyNeighboursAndPages) {
  for (const int64_t heads : {128, 16}) {
    const int64_t context = 4500;
    uint64_t alone = 0;
    const std::vector<Bf16> mine = RandomQueries(1, heads, 7);
    for (const int64_t m : {1, 2, 3, 64, 130, 300}) {
      for (const int64_t place : {int64_t{0}, m / 2, m - 1}) {
        // Sequence 0 is mine: position `context - 1`, or in the second round one of two queries,
        // the other one token later, whose key is NaN.
        std::vector<int64_t> contexts = {context + 1};
        std::vector<MlaRow> rows;
        Prng random(static_cast<uint64_t>(m * 1000 + place));
        std::vector<Bf16> q = RandomQueries(m, heads, static_cast<uint64_t>(m));
        for (int64_t row = 0; row < m; ++row) {
          if (row == place) {
            rows.push_back({static_cast<int32_t>(context - 1), 0});
            std::copy(mine.begin(), mine.end(), q.begin() + row * heads * kDim);
          } else if (row == place + 1) {
            rows.push_back({static_cast<int32_t>(context), 0});
          } else {
            if (contexts.size() < 20)
              contexts.push_back(1 + static_cast<int64_t>(random.Below(300)));
            const size_t sequence = 1 + random.Below(contexts.size() - 1);
            rows.push_back(
                {static_cast<int32_t>(contexts[sequence] - 1), static_cast<int32_t>(sequence)});
            if (row % 3 == 0)
              q[static_cast<size_t>(row * heads * kDim + 5)] = ToBf16(row % 2 ? NAN : INFINITY);
          }
        }
        Cache cache(contexts, 8, static_cast<uint64_t>(m + place));
        for (int i = 0; i < 9; ++i) cache.Row(0, context)[60 * i] = ToBf16(i % 2 ? NAN : -INFINITY);
        cache.Upload();
        const std::vector<Bf16> out = Attend(cache, rows, heads, q, 0, m > 1);
        const uint64_t hash = HashOfRow(out, heads, place);
        if (m == 1) alone = hash;
        EXPECT_EQ(hash, alone) << heads << " heads, place " << place << " of " << m;
        if (m == 1) {
          for (const Bf16 v : out) ASSERT_TRUE(std::isfinite(ToFloat(v)));
          break;
        }
      }
    }
  }
}

TEST_F(MlaAttentionTest, EveryNumberOfCtasGivesOneResult) {
  const int64_t heads = 128, context = 4150;  // three segments
  Cache cache({context}, 17, 18);
  cache.Upload();
  const std::vector<Bf16> mine = RandomQueries(1, heads, 19);
  uint64_t expected = 0;
  for (const auto& [m, ctas] : {std::pair<int64_t, int>{16, 1}, {8, 2}, {3, 4}, {1, 8}}) {
    ASSERT_EQ(MlaSegmentCtas(m, heads, context), ctas);
    std::vector<Bf16> q;
    for (int64_t row = 0; row < m; ++row) q.insert(q.end(), mine.begin(), mine.end());
    const std::vector<MlaRow> rows(static_cast<size_t>(m), {static_cast<int32_t>(context - 1), 0});
    const std::vector<Bf16> out = Attend(cache, rows, heads, q);
    if (expected == 0) expected = HashOfRow(out, heads, 0);
    for (int64_t row = 0; row < m; ++row)
      EXPECT_EQ(HashOfRow(out, heads, row), expected) << "row " << row << ", " << ctas << " CTAs";
  }
}

// Heads [first, first + heads) of rows of `row_heads`, each of `width` values.
std::vector<Bf16> HeadsOf(const std::vector<Bf16>& rows, int64_t row_heads, int64_t first,
                          int64_t heads, int64_t width) {
  std::vector<Bf16> taken;
  for (auto row = rows.begin(); row != rows.end(); row += row_heads * width)
    taken.insert(taken.end(), row + first * width, row + (first + heads) * width);
  return taken;
}

// Up to 16 heads have a tile of their own, more have tiles of 64; up to position 6,143 all have the
// same segments. Single CTAs in all calls.
TEST_F(MlaAttentionTest, AHeadHasTheSameBitsWhateverTheNumberOfHeads) {
  const std::vector<int64_t> contexts = {1,    2,    64,   65,   127,  129,  300,  1024, 1100,
                                         2048, 2049, 2112, 2177, 3136, 4096, 4097, 5000, 6144};
  Cache cache(contexts, 24, 25);
  cache.Upload();
  std::vector<MlaRow> rows;
  for (size_t copy = 0; copy < 5; ++copy) {
    for (size_t i = 0; i < contexts.size(); ++i)
      rows.push_back({static_cast<int32_t>(contexts[i] - 1), static_cast<int32_t>(i)});
  }
  const auto m = static_cast<int64_t>(rows.size());
  std::vector<Bf16> all = RandomQueries(m, kMlaMaxHeads, 26);
  for (int64_t i = 0; i < m * kMlaMaxHeads * kDim; ++i) {
    const int64_t row = i / (kMlaMaxHeads * kDim), head = i / kDim % kMlaMaxHeads;
    Bf16& v = all[static_cast<size_t>(i)];
    if (row % 5 == 1) v = ToBf16(ToFloat(v) * 40);
    if (row % 5 == 2 && head % 3 == 1) v = ToBf16(ToFloat(v) * 1e-3f);
    if (row % 7 == 5 && head % 6 == 2 && i % kDim == 7) v = ToBf16(NAN);
    if (row % 7 == 6 && head % 6 == 4 && i % kDim == 570) v = ToBf16(-INFINITY);
  }
  const std::vector<Bf16> expected = Attend(cache, rows, kMlaMaxHeads, all);
  // Heads from `first` on, in a call of their own.
  for (const auto& [heads, first] : {std::pair<int64_t, int64_t>{1, 0},
                                     {1, 37},
                                     {3, 62},
                                     {8, 8},
                                     {16, 0},
                                     {16, 112},
                                     {17, 40}}) {
    ASSERT_EQ(MlaSegmentCtas(m, heads, 6144), 1);
    const std::vector<Bf16> out =
        Attend(cache, rows, heads, HeadsOf(all, kMlaMaxHeads, first, heads, kDim));
    EXPECT_EQ(HashOf(out), HashOf(HeadsOf(expected, kMlaMaxHeads, first, heads, kRank)))
        << heads << " heads from " << first;
  }
}

// In another order a sum of probabilities differs in its last bit at most, which few outputs show:
// many short rows, whose probabilities differ by more than a sum has bits.
TEST_F(MlaAttentionTest, AHeadHasTheSameBitsInManyShortRows) {
  constexpr int64_t kFew = 16, kMany = 20, kRows = 3000;
  const std::vector<int64_t> contexts = {64, 60, 128, 190};
  Cache cache(contexts, 27, 28);
  cache.Upload();
  std::vector<MlaRow> rows;
  for (int32_t row = 0; row < kRows; ++row)
    rows.push_back({static_cast<int32_t>(contexts[static_cast<size_t>(row % 4)] - 1), row % 4});
  std::vector<Bf16> q = RandomQueries(kRows, kMany, 29);
  for (int64_t i = 0; i < kRows * kMany * kDim; ++i) {
    Bf16& v = q[static_cast<size_t>(i)];
    v = ToBf16(ToFloat(v) * static_cast<float>(1 + i / (4 * kMany * kDim) % 4));
  }
  const std::vector<Bf16> expected = Attend(cache, rows, kMany, q);
  const std::vector<Bf16> out = Attend(cache, rows, kFew, HeadsOf(q, kMany, 0, kFew, kDim));
  EXPECT_EQ(HashOf(out), HashOf(HeadsOf(expected, kMany, 0, kFew, kRank)));
}

// Contexts that end before, at and behind blocks, pairs of blocks, passes of a cluster and segments
// of both sizes. The whole call has single CTAs, its parts have clusters.
TEST_F(MlaAttentionTest, ClustersGiveTheSameBitsAsSingleCtas) {
  for (const int64_t heads : {16, 100, 128}) {
    const std::vector<int64_t> contexts = {1,    64,   65,   129,  300,  448,  513,  576,
                                           577,  1024, 1025, 1100, 2048, 2049, 3136, 4096,
                                           4097, 6144, 6145, 7168, 7169, 8192, 8300};
    Cache cache(contexts, 14, 15 + static_cast<uint64_t>(heads));
    cache.Upload();
    std::vector<MlaRow> rows;
    // Of few heads there are few sums in which a change of their order shows: more rows.
    for (int copy = 0; copy < (heads == 16 ? 9 : 3); ++copy) {
      for (size_t i = 0; i < contexts.size(); ++i)
        rows.push_back({static_cast<int32_t>(contexts[i] - 1), static_cast<int32_t>(i)});
    }
    const auto m = static_cast<int64_t>(rows.size());
    ASSERT_EQ(MlaSegmentCtas(m, heads, 8300), 1);
    std::vector<Bf16> q = RandomQueries(m, heads, 16);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < heads * kDim; ++i) {
        Bf16& v = q[static_cast<size_t>(row * heads * kDim + i)];
        // Weight on several positions, so that the order of sums shows; anchors far apart; heads
        // whose anchors never move; NaN and infinities.
        if (row % 3 == 0) v = ToBf16(ToFloat(v) * 3);
        if (row % 3 == 1) v = ToBf16(ToFloat(v) * 40);
        if (row % 3 == 2 && i / kDim % 5 == 4) v = ToBf16(ToFloat(v) * 1e-3f);
        if (row % 8 == 5 && i == 7) v = ToBf16(NAN);
        if (row % 8 == 6 && i == kDim) v = ToBf16(-INFINITY);
      }
    }
    const std::vector<Bf16> expected = Attend(cache, rows, heads, q);
    int64_t different = 0;
    // In calls of 3 and 8 short rows too have clusters of four and two: the last pass over 9, 10 or
    // 17 blocks then leaves CTAs without one.
    for (const int64_t chunk : {1, 2, 3, 8}) {
      for (int64_t row = 0; row < m; row += chunk) {
        const int64_t count = std::min(chunk, m - row);
        const std::vector<MlaRow> few(rows.begin() + row, rows.begin() + row + count);
        if (chunk <= 2) {
          ASSERT_GT(MlaSegmentCtas(count, heads, 8300), 1);
        }
        const std::vector<Bf16> out =
            Attend(cache, few, heads,
                   std::vector<Bf16>(q.begin() + row * heads * kDim,
                                     q.begin() + (row + count) * heads * kDim));
        for (int64_t i = 0; i < count; ++i)
          different += HashOfRow(out, heads, i) != HashOfRow(expected, heads, row + i);
      }
    }
    EXPECT_EQ(different, 0) << "of " << 4 * m << " rows of " << heads << " heads";
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
