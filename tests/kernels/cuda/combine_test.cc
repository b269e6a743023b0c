#include "kernels/cuda/combine/combine.h"

#include <cstdio>
#include <set>

#include "kernels/reference/dense.h"
#include "kernels/reference/experts.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/row_rule.h"

namespace moebius::kernels::cuda {
namespace {

constexpr reference::Rounding kServing = reference::Rounding::kServing;

struct Shape {
  int64_t m, dim;
  int32_t top_k, experts, per_group;
};

// Tokens with chosen experts and weights. Row j of a token is a row of `pool`.
struct Tokens {
  Tokens(const Shape& s, uint64_t seed) {
    Prng random(seed);
    for (int64_t i = 0; i < s.m; ++i) Append(s, random);
  }
  Tokens() = default;
  void Append(const Shape& s, Prng& random) {
    std::set<uint32_t> chosen;
    while (static_cast<int32_t>(chosen.size()) < s.top_k)
      chosen.insert(static_cast<uint32_t>(random.Below(static_cast<uint64_t>(s.experts))));
    for (const uint32_t e : chosen) {
      experts.push_back(ExpertId(e));
      weights.push_back(random.Unit() * 2.5f);
      index.push_back(static_cast<int32_t>(random.Below(RowPool::kRows)));
    }
  }
  std::vector<ExpertId> experts;
  std::vector<float> weights;
  std::vector<int32_t> index;
};

enum class Source { kIndex, kPointers };

struct Result {
  std::vector<Bf16> routed, h;
};

// The pool's rows lie in one buffer, or half in one and half in another.
Result Compute(const Shape& s, const Tokens& tokens, const RowPool& pool,
               const RowPool& shared_pool, const RowPool& h_pool, int64_t shift, Source source,
               bool residual, bool routed = true) {
  const std::vector<Bf16> rows = pool.Batch(RowPool::kRows, 0);
  const auto half = static_cast<size_t>(8 * s.dim);
  const DeviceBuffer<Bf16> buffer(rows);  // row r is pool row RowPool::Row(r, 0)
  const DeviceBuffer<Bf16> low(std::vector<Bf16>(rows.begin(), rows.begin() + half));
  const DeviceBuffer<Bf16> high(std::vector<Bf16>(rows.begin() + half, rows.end()));
  std::vector<const Bf16*> pointers;
  for (const int32_t i : tokens.index)
    pointers.push_back(i < 8 ? low.get() + i * s.dim : high.get() + (i - 8) * s.dim);
  const DeviceBuffer<const Bf16*> device_pointers(pointers);
  const DeviceBuffer<ExpertId> experts(tokens.experts);
  const DeviceBuffer<float> weights(tokens.weights);
  const DeviceBuffer<int32_t> index(tokens.index);
  const DeviceBuffer<Bf16> out(static_cast<size_t>(s.m * s.dim));
  const DeviceBuffer<Bf16> shared(shared_pool.Batch(s.m, shift)), h(h_pool.Batch(s.m, shift));
  CombineParams params;
  params.m = s.m;
  params.dim = s.dim;
  params.top_k = s.top_k;
  params.experts_per_group = s.per_group;
  params.experts = experts.get();
  params.weights = weights.get();
  if (source == Source::kIndex) {
    params.buffer = buffer.get();
    params.row_index = index.get();
  } else {
    params.rows = device_pointers.get();
  }
  params.out = routed ? out.get() : nullptr;
  if (residual) {
    params.shared = shared.get();
    params.h = h.get();
  }
  const absl::Status status = LaunchCombine(params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "Combine");
  return {out.Download(), h.Download()};
}

class CombineTest : public GpuTest {};

TEST_F(CombineTest, BitsAreThoseOfTheReference) {
  int64_t compared = 0;
  for (const Shape s : {Shape{5, 7168, 8, 256, 32}, Shape{40, 1040, 8, 256, 32},
                        Shape{33, 77, 6, 64, 8}, Shape{70, 16, 1, 8, 32}, Shape{20, 264, 9, 40, 4},
                        Shape{6, 128, 64, 256, 32}, Shape{9, 24, 33, 160, 1}}) {
    const RowPool pool(s.dim, 1), shared(s.dim, 2), h(s.dim, 3);
    const Tokens tokens(s, 4);
    for (const Source source : {Source::kIndex, Source::kPointers}) {
      const Result found = Compute(s, tokens, pool, shared, h, 0, source, true);
      for (int64_t i = 0; i < s.m; ++i) {
        std::vector<std::vector<float>> values;
        std::vector<const float*> rows;
        for (int32_t j = 0; j < s.top_k; ++j)
          values.push_back(
              pool.Floats(RowPool::Row(tokens.index[static_cast<size_t>(i * s.top_k + j)], 0)));
        for (const auto& row : values) rows.push_back(row.data());
        std::vector<float> y(static_cast<size_t>(s.dim));
        reference::CombineRow(absl::MakeConstSpan(tokens.experts.data() + i * s.top_k, s.top_k),
                              absl::MakeConstSpan(tokens.weights.data() + i * s.top_k, s.top_k),
                              rows, s.per_group, kServing, absl::MakeSpan(y));
        const std::vector<float> routed = y;
        reference::ResidualAddRow(shared.Floats(RowPool::Row(i, 0)), kServing, absl::MakeSpan(y));
        std::vector<float> sum = h.Floats(RowPool::Row(i, 0));
        reference::ResidualAddRow(y, kServing, absl::MakeSpan(sum));
        for (int64_t d = 0; d < s.dim; ++d, ++compared) {
          const auto at = static_cast<size_t>(i * s.dim + d);
          ASSERT_EQ(UlpDistance(found.routed[at], ToBf16(routed[static_cast<size_t>(d)])), 0)
              << s.m << " x " << s.dim << ": token " << i << ", element " << d;
          ASSERT_EQ(UlpDistance(found.h[at], ToBf16(sum[static_cast<size_t>(d)])), 0)
              << s.m << " x " << s.dim << ": h of token " << i << ", element " << d;
        }
      }
    }
  }
  std::printf("%ld values equal to the reference\n", static_cast<long>(compared));
}

TEST_F(CombineTest, TheResidualDoesNotChangeTheSumNorNeedIt) {
  for (const Shape s :
       {Shape{21, 1040, 8, 256, 32}, Shape{21, 1040, 5, 256, 32}, Shape{21, 777, 8, 256, 32}}) {
    const RowPool pool(s.dim, 1), shared(s.dim, 2), h(s.dim, 3);
    const Tokens tokens(s, 5);
    const Result both = Compute(s, tokens, pool, shared, h, 0, Source::kIndex, true);
    const Result alone = Compute(s, tokens, pool, shared, h, 0, Source::kIndex, false);
    const Result h_only = Compute(s, tokens, pool, shared, h, 0, Source::kIndex, true, false);
    EXPECT_EQ(HashOf(both.routed), HashOf(alone.routed)) << s.top_k << " of " << s.dim;
    EXPECT_EQ(HashOf(both.h), HashOf(h_only.h)) << s.top_k << " of " << s.dim;
    EXPECT_EQ(HashOf(alone.h), HashOf(h.Batch(s.m, 0))) << "without shared h is left alone";
  }
}

TEST_F(CombineTest, ATokenHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  for (const int64_t dim : {1040, 777}) {
    const RowPool pool(dim, 6), shared(dim, 7), h(dim, 8);
    Prng random(9);
    std::vector<Tokens> kinds(RowPool::kRows);
    for (Tokens& kind : kinds) kind.Append({1, dim, 8, 256, 32}, random);
    ExpectRowRule("Combine", 2 * dim, [&](int64_t m, int64_t shift) {
      Tokens batch;
      for (int64_t i = 0; i < m; ++i) {
        const Tokens& kind = kinds[static_cast<size_t>(RowPool::Row(i, shift))];
        batch.experts.insert(batch.experts.end(), kind.experts.begin(), kind.experts.end());
        batch.weights.insert(batch.weights.end(), kind.weights.begin(), kind.weights.end());
        batch.index.insert(batch.index.end(), kind.index.begin(), kind.index.end());
      }
      // From pointers where the batch is large, by index where it is small: the same bits.
      const Result result = Compute({m, dim, 8, 256, 32}, batch, pool, shared, h, shift,
                                    m > 64 ? Source::kPointers : Source::kIndex, true);
      RowHashes hashes(m);
      hashes.Add(result.routed, dim, dim);
      hashes.Add(result.h, dim, dim);
      return hashes.hashes();
    });
  }
}

TEST_F(CombineTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  CombineParams params;
  EXPECT_TRUE(LaunchCombine(params, nullptr).ok()) << "no tokens";
  const auto refusal = [&] { return std::string(LaunchCombine(params, nullptr).message()); };
  const DeviceBuffer<Bf16> rows(64);
  const DeviceBuffer<float> weights(64);
  params.m = 1;
  EXPECT_NE(refusal().find("dim is 0"), std::string::npos);
  params.dim = 8;
  params.top_k = 65;
  EXPECT_NE(refusal().find("top_k is 65"), std::string::npos);
  params.top_k = 8;
  params.experts_per_group = 0;
  EXPECT_NE(refusal().find("experts_per_group is 0"), std::string::npos);
  params.experts_per_group = 32;
  EXPECT_NE(refusal().find("experts is null"), std::string::npos);
  params.experts = reinterpret_cast<const ExpertId*>(weights.get());
  EXPECT_NE(refusal().find("weights is null"), std::string::npos);
  params.weights = weights.get();
  EXPECT_NE(refusal().find("buffer is null"), std::string::npos);
  params.buffer = rows.get();
  EXPECT_NE(refusal().find("row_index is null"), std::string::npos);
  params.rows = reinterpret_cast<const Bf16* const*>(rows.get());
  EXPECT_NE(refusal().find("both rows and buffer"), std::string::npos);
  params.buffer = nullptr;
  EXPECT_NE(refusal().find("out is null"), std::string::npos);
  params.shared = rows.get();
  EXPECT_NE(refusal().find("one of shared and h"), std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
