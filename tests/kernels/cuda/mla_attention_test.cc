// The MLA core against kernels/reference, launched many times, and behind kernels that write and
// read late. The row rule: mla_attention_row_rule_test.cc.

#include "kernels/cuda/mla_attention/mla_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "kernels/reference/attention.h"
#include "tests/kernels/cuda/launch_comparison.h"
#include "tests/kernels/cuda/mla_attention_batch.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

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

// No row is shared: the merging kernel has nothing to do, and must still end last.
TEST_F(MlaAttentionTest, LaunchesWithNothingToMergeAgree) {
  constexpr int64_t kRows = 128, kHeads = 16, kTokens = 4096;
  Cache cache({kTokens}, 9, 20);
  cache.Upload();
  const std::vector<MlaRow> rows(kRows, {kTokens - 1, 0});
  Call call(cache, rows, kHeads, RandomQueries(kRows, kHeads, 21));
  ASSERT_EQ(MlaSegmentCtas(kRows, kHeads, call.params.max_context), 1);
  const DeviceBuffer<Bf16> out(call.out_size), other(call.out_size);
  ExpectEqualLaunches({{{{out.get(), 2 * call.out_size}}, {{other.get(), 2 * call.out_size}}}},
                      [&](int set, cudaStream_t stream) {
                        call.params.out = set == 0 ? out.get() : other.get();
                        return LaunchMlaAttention(call.params, stream);
                      });
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
  // A cluster for each segment; single CTAs for few heads.
  for (const auto& [heads, copies] : {std::pair<int64_t, int>{128, 1}, {16, 1}, {16, 30}}) {
    SCOPED_TRACE(testing::Message() << heads << " heads, " << copies << " copies");
    Cache cache({3000, 70, 1500}, 9, 14);
    cache.Upload();
    std::vector<MlaRow> rows;
    for (int copy = 0; copy < copies; ++copy)
      rows.insert(rows.end(), {{2999, 0}, {69, 1}, {1499, 2}});
    const auto m = static_cast<int64_t>(rows.size());
    ASSERT_EQ(MlaSegmentCtas(m, heads, 3000) > 1, copies == 1);
    Call call(cache, rows, heads, RandomQueries(m, heads, 15));
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
      EXPECT_TRUE(reader.FoundTheFilling()) << what;
      EXPECT_EQ(HashOf(out.Download()), expected) << what;
    };
    run_behind_reader(out.get(), out.count() * sizeof(Bf16), "output");
    run_behind_reader(workspace.get(), workspace.count(), "workspace");
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
