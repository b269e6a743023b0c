// Goal: the absorbed form is multi-head attention. Method: the naive form of the DeepSeek-V2 report
// (expand keys and values per head) in double, on random rows; and the cache row by hand.

#include "kernels/reference/attention.h"

#include <cmath>
#include <vector>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::kernels::reference {
namespace {

constexpr MlaDims kDims{.num_heads = 3,
                        .qk_nope_head_dim = 6,
                        .qk_rope_head_dim = 4,
                        .v_head_dim = 5,
                        .kv_lora_rank = 8};

std::vector<float> Random(Prng& prng, int64_t count) {
  std::vector<float> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(4.0f * prng.Unit() - 2.0f);
  return values;
}

TEST(MlaAttention, AbsorbedEqualsNaive) {
  Prng prng(7);
  constexpr int64_t kKeys = 9, kRank = 8, kNope = 6, kRope = 4, kV = 5;
  constexpr float kScale = 0.31f;
  const std::vector<float> q = Random(prng, 3 * (kNope + kRope));
  const std::vector<float> kv_b = Random(prng, 3 * (kNope + kV) * kRank);
  const std::vector<float> cache = Random(prng, kKeys * (kRank + kRope));
  std::vector<const float*> latents;
  for (int64_t s = 0; s < kKeys; ++s) latents.push_back(&cache[s * (kRank + kRope)]);
  std::vector<float> out(3 * kV);
  MlaAttentionRow(kDims, q, kv_b, kScale, latents, Rounding::kFloat32, absl::MakeSpan(out));

  for (int64_t h = 0; h < 3; ++h) {
    const float* w = &kv_b[h * (kNope + kV) * kRank];
    const auto expand = [&](int64_t row, int64_t s) {
      double sum = 0;
      for (int64_t j = 0; j < kRank; ++j) sum += double{w[row * kRank + j]} * latents[s][j];
      return sum;
    };
    std::vector<double> p;
    double total = 0;
    for (int64_t s = 0; s < kKeys; ++s) {
      double score = 0;
      for (int64_t d = 0; d < kNope; ++d) score += q[h * (kNope + kRope) + d] * expand(d, s);
      for (int64_t d = 0; d < kRope; ++d) {
        score += double{q[h * (kNope + kRope) + kNope + d]} * latents[s][kRank + d];
      }
      p.push_back(std::exp(score * kScale));
      total += p.back();
    }
    for (int64_t i = 0; i < kV; ++i) {
      double expected = 0;
      for (int64_t s = 0; s < kKeys; ++s) expected += p[s] / total * expand(kNope + i, s);
      EXPECT_NEAR(out[h * kV + i], expected, 1e-4) << "head " << h << " value " << i;
    }
  }
}

TEST(Rotate, PairsAreInterleaved) {
  const std::vector<float> cos_sin = {0.0f, 1.0f, 1.0f, 0.0f};  // 90 degrees, then none
  std::vector<float> x = {1.0f, 2.0f, 3.0f, 4.0f};
  RotateRow(cos_sin, Rounding::kFloat32, absl::MakeSpan(x));
  EXPECT_EQ(x, (std::vector<float>{-2.0f, 1.0f, 3.0f, 4.0f}));
}

TEST(LatentRow, NormalisesTheLatentAndRotatesTheKeyOnly) {
  std::vector<float> kv(12, 2.0f);
  kv[8] = 5.0f;
  kv[9] = 7.0f;
  const std::vector<float> norm = {1, 1, 1, 1, 1, 1, 1, 3};
  const std::vector<float> cos_sin = {0.0f, 1.0f, 1.0f, 0.0f};
  std::vector<float> out(12);
  LatentRow(kDims, kv, norm, 0.0f, cos_sin, Rounding::kFloat32, absl::MakeSpan(out));
  EXPECT_EQ(out, (std::vector<float>{1, 1, 1, 1, 1, 1, 1, 3, -7, 5, 2, 2}));
}

}  // namespace
}  // namespace moebius::kernels::reference
