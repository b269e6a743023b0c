// The MLA core against kernels/reference, and the row rule: an output row is a function of its own
// query, position and cache rows, wherever it stands.

#include "kernels/cuda/mla_attention/mla_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/reference/attention.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/launch_comparison.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int64_t kRank = kMlaLatentRank, kDim = kMlaLatentDim;
constexpr float kScale = 0.0721688f;  // 192^-1/2

// Sequences in one paged cache, blocks shuffled; what no position uses is NaN.
class Cache {
 public:
  // `contexts`: positions of each sequence that exist. `seed` decides contents, `order` the blocks.
  Cache(const std::vector<int64_t>& contexts, uint64_t seed, uint64_t order) {
    Prng random(order);
    for (const int64_t context : contexts) {
      max_blocks_ = std::max(max_blocks_, (context + 63) / 64);
      num_blocks_ += (context + 63) / 64;
    }
    num_blocks_ += 3;  // some that nobody uses
    std::vector<int32_t> ids(static_cast<size_t>(num_blocks_));
    std::iota(ids.begin(), ids.end(), 0);
    for (size_t i = ids.size(); i > 1; --i) std::swap(ids[i - 1], ids[random.Below(i)]);
    values_.assign(static_cast<size_t>(num_blocks_ * 64 * kDim), ToBf16(NAN));
    tables_.assign(contexts.size() * static_cast<size_t>(max_blocks_), 0);
    size_t next = 0;
    for (size_t sequence = 0; sequence < contexts.size(); ++sequence) {
      Prng contents(seed + 1000 * sequence);
      for (int64_t t = 0; t < contexts[sequence]; ++t) {
        if (t % 64 == 0)
          tables_[sequence * static_cast<size_t>(max_blocks_) + static_cast<size_t>(t / 64)] =
              ids[next++];
        for (int64_t i = 0; i < kDim; ++i) Row(sequence, t)[i] = ToBf16(contents.Unit() * 4 - 2);
      }
    }
  }
  Bf16* Row(size_t sequence, int64_t t) {
    const int64_t block =
        tables_[sequence * static_cast<size_t>(max_blocks_) + static_cast<size_t>(t / 64)];
    return values_.data() + (block * 64 + t % 64) * kDim;
  }
  void Upload() {
    device_values_ = std::make_unique<DeviceBuffer<Bf16>>(values_);
    device_tables_ = std::make_unique<DeviceBuffer<int32_t>>(tables_);
  }
  void Fill(MlaAttentionCoreParams& params) const {
    params.cache = device_values_->get();
    params.num_blocks = num_blocks_;
    params.block_tables = device_tables_->get();
    params.max_blocks = max_blocks_;
  }

 private:
  int64_t max_blocks_ = 0, num_blocks_ = 0;
  std::vector<Bf16> values_;
  std::vector<int32_t> tables_;
  std::unique_ptr<DeviceBuffer<Bf16>> device_values_;
  std::unique_ptr<DeviceBuffer<int32_t>> device_tables_;
};

// [m, heads, 576].
std::vector<Bf16> RandomQueries(int64_t m, int64_t heads, uint64_t seed) {
  Prng random(seed);
  std::vector<Bf16> q(static_cast<size_t>(m * heads * kDim));
  for (Bf16& v : q) v = ToBf16(random.Unit() * 4 - 2);
  return q;
}

// Grows, and is left as earlier launches left it: its contents must not matter.
std::unique_ptr<DeviceBuffer<uint8_t>> workspace;
const DeviceBuffer<uint8_t>& Workspace(int64_t bytes) {
  if (!workspace || static_cast<int64_t>(workspace->count()) < bytes)
    workspace = std::make_unique<DeviceBuffer<uint8_t>>(static_cast<size_t>(bytes));
  return *workspace;
}

// The parameters of a call but its output, and the device memory that they name.
struct Call {
  Call(const Cache& cache, const std::vector<MlaRow>& call_rows, int64_t heads,
       const std::vector<Bf16>& queries, int64_t segment_tokens = 0)
      : q(queries),
        rows(call_rows),
        out_size(call_rows.size() * static_cast<size_t>(heads * kRank)) {
    params.m = static_cast<int64_t>(call_rows.size());
    params.num_heads = heads;
    params.q = q.get();
    params.softmax_scale = kScale;
    params.rows = rows.get();
    cache.Fill(params);
    for (const MlaRow& row : call_rows)
      params.max_context = std::max<int64_t>(params.max_context, row.position + 1);
    params.workspace_bytes =
        MlaAttentionWorkspaceBytesWithSegments(params.m, heads, params.max_context, segment_tokens);
    params.workspace = Workspace(params.workspace_bytes).get();
  }

  DeviceBuffer<Bf16> q;
  DeviceBuffer<MlaRow> rows;
  size_t out_size;  // elements
  MlaAttentionCoreParams params;
};

std::vector<Bf16> Attend(const Cache& cache, const std::vector<MlaRow>& rows, int64_t heads,
                         const std::vector<Bf16>& q, int64_t segment_tokens = 0,
                         bool beside_another = false) {
  Call call(cache, rows, heads, q, segment_tokens);
  const DeviceBuffer<Bf16> out(call.out_size);
  call.params.out = out.get();
  std::optional<CompetingKernel> competing;  // only now: allocating would wait for its end
  if (beside_another) competing.emplace();
  const absl::Status status = LaunchMlaAttentionWithSegments(call.params, segment_tokens, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "MlaAttention");
  if (competing) {
    EXPECT_TRUE(competing->Runs());
  }
  competing.reset();
  return out.Download();
}

// kernels/reference for one head: identity projections on both sides leave the core.
class Reference {
 public:
  Reference() : kv_b_(static_cast<size_t>(2 * kRank * kRank)) {
    for (int64_t i = 0; i < kRank; ++i) {
      kv_b_[static_cast<size_t>(i * kRank + i)] = 1;
      kv_b_[static_cast<size_t>((kRank + i) * kRank + i)] = 1;
    }
  }
  std::vector<float> Head(Cache& cache, const MlaRow& row, const Bf16* q) const {
    MlaDims dims;
    dims.num_heads = 1;
    dims.qk_nope_head_dim = dims.v_head_dim = dims.kv_lora_rank = kRank;
    dims.qk_rope_head_dim = kDim - kRank;
    std::vector<float> query(kDim), out(kRank);
    for (int64_t i = 0; i < kDim; ++i) query[static_cast<size_t>(i)] = ToFloat(q[i]);
    std::vector<float> latents(static_cast<size_t>((row.position + 1) * kDim));
    std::vector<const float*> pointers;
    for (int64_t t = 0; t <= row.position; ++t) {
      float* const latent = latents.data() + t * kDim;
      const Bf16* const from = cache.Row(static_cast<size_t>(row.sequence), t);
      for (int64_t i = 0; i < kDim; ++i) latent[i] = ToFloat(from[i]);
      pointers.push_back(latent);
    }
    reference::MlaAttentionRow(dims, query, kv_b_, kScale, pointers, reference::Rounding::kServing,
                               absl::MakeSpan(out));
    return out;
  }

 private:
  std::vector<float> kv_b_;
};

class MlaAttentionTest : public GpuTest {
 protected:
  static void TearDownTestSuite() { workspace.reset(); }  // checks its guards
};

TEST_F(MlaAttentionTest, AgreesWithTheReference) {
  const Reference reference;
  for (const int64_t heads : {1, 16, 64, 100, 128}) {
    const std::vector<int64_t> contexts = {1,    63,   64,   65,   127,  128, 513,
                                           1025, 2047, 2048, 2049, 5000, 6145};
    Cache cache(contexts, 1, 2 + static_cast<uint64_t>(heads));
    cache.Upload();
    std::vector<MlaRow> rows;
    for (size_t i = 0; i < contexts.size(); ++i)
      rows.push_back({static_cast<int32_t>(contexts[i] - 1), static_cast<int32_t>(i)});
    const auto m = static_cast<int64_t>(rows.size());
    const std::vector<Bf16> q = RandomQueries(m, heads, 3);
    const std::vector<Bf16> out = Attend(cache, rows, heads, q);
    std::vector<float> all_found, all_expected;
    double worst = 0;
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t head = 0; head < heads; head += 37) {
        const int64_t at = row * heads + head;
        const std::vector<float> expected =
            reference.Head(cache, rows[static_cast<size_t>(row)], q.data() + at * kDim);
        std::vector<float> found;
        for (int64_t i = 0; i < kRank; ++i)
          found.push_back(ToFloat(out[static_cast<size_t>(at * kRank + i)]));
        const double difference = RelativeDifference(found, expected);
        worst = difference <= worst ? worst : difference;  // NaN stays
        // The measure of the reference sheet (1 - 2 sum(x y) / sum(x^2 + y^2), bound 5e-6) takes a
        // whole output, which is asserted below. For a single head probabilities in BF16 alone give
        // up to 4e-6, where few positions have most of the weight.
        EXPECT_LT(difference, 1e-5) << heads << " heads, head " << head << ", context "
                                    << contexts[static_cast<size_t>(row)];
        all_found.insert(all_found.end(), found.begin(), found.end());
        all_expected.insert(all_expected.end(), expected.begin(), expected.end());
      }
    }
    const double difference = RelativeDifference(all_found, all_expected);
    std::printf("%3ld heads: difference %.2g, worst head %.2g\n", heads, difference, worst);
    EXPECT_LT(difference, 5e-6) << heads << " heads";
  }
}

uint64_t HashOfRow(const std::vector<Bf16>& out, int64_t heads, int64_t row) {
  const auto size = static_cast<size_t>(heads * kRank);
  const auto begin = out.begin() + static_cast<int64_t>(size) * row;
  return HashOf(std::vector<Bf16>(begin, begin + static_cast<int64_t>(size)));
}

// Single CTAs have a form of their own for at most 16 heads. In a call of 30 rows CTAs share them;
// in one of 260 each CTA has whole ones.
TEST_F(MlaAttentionTest, FewHeadsAgreeWithTheReferenceInSingleCtas) {
  const Reference reference;
  const std::vector<int64_t> contexts = {65, 1, 63, 64, 129, 513, 2047, 2048, 2049, 4160};
  const auto kinds = static_cast<int64_t>(contexts.size());
  for (const int64_t heads : {1, 5, 16}) {
    Cache cache(contexts, 20, 21 + static_cast<uint64_t>(heads));
    cache.Upload();
    const std::vector<Bf16> q = RandomQueries(kinds, heads, 22);
    std::vector<uint64_t> hashes;  // of rows of each kind
    for (const int64_t m : {30, 260}) {
      std::vector<MlaRow> rows;
      std::vector<Bf16> queries;
      for (int64_t row = 0; row < m; ++row) {
        const int64_t kind = row < 30 ? row % kinds : 0;
        rows.push_back({static_cast<int32_t>(contexts[static_cast<size_t>(kind)] - 1),
                        static_cast<int32_t>(kind)});
        const auto from = q.begin() + kind * heads * kDim;
        queries.insert(queries.end(), from, from + heads * kDim);
      }
      ASSERT_EQ(MlaSegmentCtas(m, heads, 4160), 1);
      const std::vector<Bf16> out = Attend(cache, rows, heads, queries);
      if (hashes.empty()) {
        std::vector<float> all_found, all_expected;
        for (int64_t kind = 0; kind < kinds; ++kind) {
          hashes.push_back(HashOfRow(out, heads, kind));
          for (int64_t head = 0; head < heads; head += 7) {
            const int64_t at = kind * heads + head;
            const std::vector<float> expected =
                reference.Head(cache, rows[static_cast<size_t>(kind)], q.data() + at * kDim);
            std::vector<float> found;
            for (int64_t i = 0; i < kRank; ++i)
              found.push_back(ToFloat(out[static_cast<size_t>(at * kRank + i)]));
            EXPECT_LT(RelativeDifference(found, expected), 1e-5)
                << heads << " heads, head " << head << ", context "
                << contexts[static_cast<size_t>(kind)];
            all_found.insert(all_found.end(), found.begin(), found.end());
            all_expected.insert(all_expected.end(), expected.begin(), expected.end());
          }
        }
        EXPECT_LT(RelativeDifference(all_found, all_expected), 5e-6) << heads << " heads";
      }
      for (int64_t row = 0; row < m; ++row) {
        EXPECT_EQ(HashOfRow(out, heads, row),
                  hashes[static_cast<size_t>(rows[static_cast<size_t>(row)].sequence)])
            << "row " << row << " of " << m << ", " << heads << " heads";
      }
    }
  }
}

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

TEST_F(MlaAttentionTest, LaunchesBesideACompetingKernelAgree) {
  // Of 17 and 10 blocks a cluster's last pass leaves CTAs without one.
  const std::vector<int64_t> contexts = {1030, 3000, 1500, 577, 2500};
  Cache cache(contexts, 9, 10);
  cache.Upload();
  struct Launches {
    size_t m;
    int64_t heads;
    int ctas;
  };
  // Clusters of every size for a segment, rows shared by CTAs, and rows that each have one.
  for (const auto& [m, heads, ctas] : {Launches{1, 128, 8},
                                       {6, 128, 4},
                                       {12, 128, 2},
                                       {32, 128, 1},
                                       {150, 128, 1},
                                       {60, 16, 1},
                                       {300, 16, 1}}) {
    SCOPED_TRACE(testing::Message() << m << " rows, " << heads << " heads");
    std::vector<MlaRow> rows;
    for (size_t i = 0; i < m; ++i) {
      const size_t sequence = i % contexts.size();
      rows.push_back(
          {static_cast<int32_t>(contexts[sequence] - 1), static_cast<int32_t>(sequence)});
    }
    Call call(cache, rows, heads, RandomQueries(static_cast<int64_t>(m), heads, 11));
    ASSERT_EQ(MlaSegmentCtas(call.params.m, heads, call.params.max_context), ctas);
    const DeviceBuffer<Bf16> out(call.out_size), other(call.out_size);
    ExpectEqualLaunches({{{{out.get(), 2 * call.out_size}}, {{other.get(), 2 * call.out_size}}}},
                        [&](int set, cudaStream_t stream) {
                          call.params.out = set == 0 ? out.get() : other.get();
                          return LaunchMlaAttention(call.params, stream);
                        });
  }
}

TEST_F(MlaAttentionTest, WhatTheKernelInFrontWritesIsWaitedFor) {
  Cache cache({3000, 70, 1500}, 9, 12);
  cache.Upload();
  // A cluster for each segment; single CTAs for few heads.
  for (const auto& [heads, copies] : {std::pair<int64_t, int>{128, 1}, {16, 30}}) {
    std::vector<MlaRow> rows;
    for (int copy = 0; copy < copies; ++copy)
      rows.insert(rows.end(), {{2999, 0}, {69, 1}, {1499, 2}});
    const auto m = static_cast<int64_t>(rows.size());
    ASSERT_EQ(MlaSegmentCtas(m, heads, 3000) > 1, copies == 1);
    Call call(cache, rows, heads, RandomQueries(m, heads, 13));
    DeviceBuffer<Bf16> out(call.out_size);
    MlaAttentionCoreParams& params = call.params;
    params.out = out.get();
    ASSERT_STATUS_OK(LaunchMlaAttention(params, nullptr));
    const uint64_t expected = HashOf(out.Download());
    const auto run_behind = [&](const void* input, size_t bytes, const char* what) {
      out.Poison();
      const LateInput late(const_cast<void*>(input), bytes);
      ASSERT_STATUS_OK(LaunchMlaAttention(params, nullptr));
      EXPECT_EQ(HashOf(out.Download()), expected) << heads << " heads, " << what;
    };
    run_behind(call.q.get(), call.q.count() * sizeof(Bf16), "queries");
    run_behind(call.rows.get(), call.rows.count() * sizeof(MlaRow), "rows");
    run_behind(params.cache, static_cast<size_t>(params.num_blocks * 64 * kDim) * sizeof(Bf16),
               "cache");
    run_behind(params.block_tables, static_cast<size_t>(3 * params.max_blocks) * sizeof(int32_t),
               "block tables");
  }
}

TEST_F(MlaAttentionTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  MlaAttentionCoreParams params;
  EXPECT_TRUE(LaunchMlaAttention(params, nullptr).ok()) << "no rows";
  params.m = 1;
  const auto expect = [&](const char* text) {
    const absl::Status status = LaunchMlaAttention(params, nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(text), absl::string_view::npos) << status.ToString();
  };
  expect("num_heads is 0");
  params.num_heads = 129;
  expect("num_heads is 129");
  params.num_heads = 128;
  expect("num_blocks is 0");
  params.num_blocks = 1;
  expect("max_context is 0");
  params.max_context = 65;
  params.max_blocks = 1;
  expect("max_blocks is 1");
  params.max_context = 64;
  expect("softmax_scale is 0");
  params.softmax_scale = 1;
  expect("q is null");
}

// The kernel in front lets the next one start at once and reads late what that one overwrites.
TEST_F(MlaAttentionTest, OutputsAreLeftAloneUntilTheKernelInFrontHasReadThem) {
  for (const int64_t heads : {16, 128}) {
    Cache cache({3000, 70, 1500}, 9, 14);
    cache.Upload();
    Call call(cache, {{2999, 0}, {69, 1}, {1499, 2}}, heads, RandomQueries(3, heads, 15));
    const DeviceBuffer<Bf16> out(call.out_size);
    const DeviceBuffer<uint8_t> workspace(static_cast<size_t>(call.params.workspace_bytes));
    call.params.out = out.get();
    call.params.workspace = workspace.get();
    ASSERT_STATUS_OK(
        LaunchMlaAttention(call.params, nullptr));  // a first launch may wait for others
    const uint64_t expected = HashOf(out.Download());
    const auto run_behind_reader = [&](void* memory, size_t bytes, const char* what) {
      const LateReader reader(memory, bytes);
      ASSERT_STATUS_OK(LaunchMlaAttention(call.params, nullptr));
      EXPECT_TRUE(reader.FoundTheFilling()) << heads << " heads, " << what;
      EXPECT_EQ(HashOf(out.Download()), expected) << heads << " heads, " << what;
    };
    run_behind_reader(out.get(), out.count() * sizeof(Bf16), "output");
    run_behind_reader(workspace.get(), workspace.count(), "workspace");
  }
}

// The number of rows decides how many CTAs share a segment.
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
    for (int copy = 0; copy < 3; ++copy) {
      for (size_t i = 0; i < contexts.size(); ++i)
        rows.push_back({static_cast<int32_t>(contexts[i] - 1), static_cast<int32_t>(i)});
    }
    const auto m = static_cast<int64_t>(rows.size());
    ASSERT_EQ(MlaSegmentCtas(m, heads, 8300), 1);
    std::vector<Bf16> q = RandomQueries(m, heads, 16);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < heads * kDim; ++i) {
        Bf16& v = q[static_cast<size_t>(row * heads * kDim + i)];
        // Anchors far apart; heads whose anchors never move; NaN and infinities.
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
