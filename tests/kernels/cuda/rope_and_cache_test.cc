#include "kernels/cuda/rope_and_cache/rope_and_cache.h"

#include <cmath>
#include <memory>

#include "kernels/reference/attention.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/row_rule.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int64_t kMaxPositions = 700;

// Tables and weights of a model, on both sides.
struct Model {
  Model(int64_t heads, int64_t nope, int64_t rope, int64_t rank) {
    dims.num_heads = heads;
    dims.qk_nope_head_dim = nope;
    dims.qk_rope_head_dim = rope;
    dims.kv_lora_rank = rank;
    Prng random(1);
    kv_norm = RandomFloats(random, static_cast<size_t>(rank));
    for (int64_t t = 0; t < kMaxPositions; ++t) {
      for (int64_t i = 0; i < rope / 2; ++i) {
        const float angle = static_cast<float>(t) * std::pow(10000.0f, -2.0f * i / rope);
        cos_sin.push_back(std::cos(angle));
        cos_sin.push_back(std::sin(angle));
      }
    }
    device_kv_norm = std::make_unique<DeviceBuffer<float>>(kv_norm);
    device_cos_sin = std::make_unique<DeviceBuffer<float>>(cos_sin);
  }
  int64_t q_dim() const { return dims.num_heads * dims.q_head_dim(); }
  int64_t absorbed_dim() const { return dims.num_heads * dims.latent_dim(); }
  MlaDims dims;
  std::vector<float> kv_norm, cos_sin;
  std::unique_ptr<DeviceBuffer<float>> device_kv_norm, device_cos_sin;
};

struct Result {
  std::vector<Bf16> q_absorbed;  // [m, heads, latent_dim]
  std::vector<Bf16> latents;     // [m, latent_dim], gathered from the cache
  std::vector<Bf16> cache;
};

// Row i stands at positions[i] of a sequence of its own.
Result Compute(const Model& model, const std::vector<Bf16>& q, const std::vector<Bf16>& kv,
               int64_t kv_stride, const std::vector<int32_t>& positions) {
  const int64_t m = static_cast<int64_t>(positions.size()), latent = model.dims.latent_dim();
  const int64_t tables = kMaxPositions / kCacheBlockTokens + 1;
  // Each row has a block of its own; everything else of its table points far outside of the cache.
  std::vector<int32_t> block_tables(static_cast<size_t>(m * tables), 1 << 30);
  std::vector<int64_t> block_of;
  for (int64_t i = 0; i < m; ++i) {
    block_of.push_back(m - 1 - i);
    block_tables[static_cast<size_t>(i * tables + positions[static_cast<size_t>(i)] / 64)] =
        static_cast<int32_t>(block_of.back());
  }
  const DeviceBuffer<int32_t> device_tables(block_tables);
  std::vector<SequenceRow> rows;
  for (int64_t i = 0; i < m; ++i)
    rows.push_back({positions[static_cast<size_t>(i)], device_tables.get() + i * tables});
  const DeviceBuffer<SequenceRow> device_rows(rows);
  const DeviceBuffer<Bf16> device_q(q), device_kv(kv);
  const DeviceBuffer<Bf16> absorbed(static_cast<size_t>(m * model.absorbed_dim()));
  const DeviceBuffer<Bf16> cache(static_cast<size_t>(m * kCacheBlockTokens * latent));
  RopeAndCacheParams params;
  params.m = m;
  params.dims = model.dims;
  params.q = device_q.get();
  params.q_absorbed = absorbed.get();
  params.kv = device_kv.get();
  params.kv_stride = kv_stride;
  params.kv_norm = model.device_kv_norm->get();
  params.cos_sin = model.device_cos_sin->get();
  params.rows = device_rows.get();
  params.cache = cache.get();
  const absl::Status status = LaunchRopeAndCache(params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "RopeAndCache");
  Result result{absorbed.Download(), {}, cache.Download()};
  for (int64_t i = 0; i < m; ++i) {
    const int64_t row = block_of[static_cast<size_t>(i)] * kCacheBlockTokens +
                        positions[static_cast<size_t>(i)] % kCacheBlockTokens;
    result.latents.insert(result.latents.end(), result.cache.begin() + row * latent,
                          result.cache.begin() + (row + 1) * latent);
  }
  return result;
}

class RopeAndCacheTest : public GpuTest {};

TEST_F(RopeAndCacheTest, RotationIsBitEqualAndTheNormWithinOneUnitOfTheReference) {
  UlpReport rotated, norms;
  struct Case {
    int64_t m, heads, nope, rope, rank, kv_padding;
  };
  for (const Case c :
       {Case{70, 128, 128, 64, 512, 1536}, Case{9, 16, 128, 64, 512, 0}, Case{33, 3, 5, 6, 27, 1},
        Case{20, 40, 16, 8, 32, 8}, Case{7, 2, 24, 2, 4096, 0}, Case{5, 1, 0, 16, 1, 3}}) {
    const Model model(c.heads, c.nope, c.rope, c.rank);
    const int64_t latent = model.dims.latent_dim(), stride = latent + c.kv_padding;
    const RowPool q_pool(model.q_dim(), 2), kv_pool(latent, 3);
    std::vector<int32_t> positions;
    Prng random(4);
    for (int64_t i = 0; i < c.m; ++i)
      positions.push_back(static_cast<int32_t>(i < 3 ? 63 + i : random.Below(kMaxPositions)));
    const std::vector<Bf16> q = q_pool.Batch(c.m, 0), kv = kv_pool.Batch(c.m, 0, stride);
    const Result found = Compute(model, q, kv, stride, positions);
    for (int64_t i = 0; i < c.m; ++i) {
      const auto cos_sin = absl::MakeConstSpan(
          model.cos_sin.data() + positions[static_cast<size_t>(i)] * c.rope, c.rope);
      for (int64_t h = 0; h < c.heads; ++h) {
        std::vector<float> x;
        for (int64_t d = 0; d < c.rope; ++d) {
          x.push_back(
              ToFloat(q[static_cast<size_t>((i * c.heads + h) * (c.nope + c.rope) + c.nope + d)]));
        }
        reference::RotateRow(cos_sin, reference::Rounding::kServing, absl::MakeSpan(x));
        const int64_t at = (i * c.heads + h) * latent;
        for (int64_t d = 0; d < c.rank; ++d) {
          ASSERT_EQ(found.q_absorbed[static_cast<size_t>(at + d)].bits, 0xcdcd) << "latent columns";
        }
        for (int64_t d = 0; d < c.rope; ++d) {
          rotated.Add(found.q_absorbed[static_cast<size_t>(at + c.rank + d)],
                      ToBf16(x[static_cast<size_t>(d)]));
        }
      }
      std::vector<float> x, row(static_cast<size_t>(latent));
      for (int64_t d = 0; d < latent; ++d)
        x.push_back(ToFloat(kv[static_cast<size_t>(i * stride + d)]));
      reference::LatentRow(model.dims, x, model.kv_norm, 1e-6f, cos_sin,
                           reference::Rounding::kServing, absl::MakeSpan(row));
      for (int64_t d = 0; d < latent; ++d) {
        (d < c.rank ? norms : rotated)
            .Add(found.latents[static_cast<size_t>(i * latent + d)],
                 ToBf16(row[static_cast<size_t>(d)]));
      }
    }
    // Everything else of the cache is still poison.
    int64_t written = 0;
    for (const Bf16 value : found.cache) written += value.bits != 0xcdcd;
    EXPECT_LE(written, c.m * latent);
  }
  rotated.Print("rotated values against the reference");
  norms.Print("normalised latents against the reference");
  EXPECT_EQ(rotated.worst, 0);
  EXPECT_LE(norms.worst, 1);
}

TEST_F(RopeAndCacheTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  const Model model(4, 16, 64, 512);
  const int64_t latent = model.dims.latent_dim();
  const RowPool q_pool(model.q_dim(), 5), kv_pool(latent, 6);
  ExpectRowRule(
      "RopeAndCache", latent + 4 * 64,
      [&](int64_t m, int64_t shift) {
        std::vector<int32_t> positions;
        for (int64_t i = 0; i < m; ++i)
          positions.push_back(static_cast<int32_t>(37 * RowPool::Row(i, shift)));
        const Result result =
            Compute(model, q_pool.Batch(m, shift), kv_pool.Batch(m, shift), latent, positions);
        RowHashes hashes(m);
        hashes.Add(result.q_absorbed, model.absorbed_dim(), model.absorbed_dim());
        hashes.Add(result.latents, latent, latent);
        return hashes.hashes();
      },
      512);  // every row has a cache block of its own here: 38 MB
}

TEST_F(RopeAndCacheTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  RopeAndCacheParams params;
  EXPECT_TRUE(LaunchRopeAndCache(params, nullptr).ok()) << "no rows";
  const auto refusal = [&] { return std::string(LaunchRopeAndCache(params, nullptr).message()); };
  params.m = 1;
  EXPECT_NE(refusal().find("dims.num_heads is 0"), std::string::npos);
  params.dims.num_heads = 4;
  params.dims.kv_lora_rank = 5000;
  EXPECT_NE(refusal().find("dims.kv_lora_rank is 5000"), std::string::npos);
  params.dims.kv_lora_rank = 32;
  params.dims.qk_rope_head_dim = 7;
  EXPECT_NE(refusal().find("dims.qk_rope_head_dim is odd"), std::string::npos);
  params.dims.qk_rope_head_dim = 8;
  EXPECT_NE(refusal().find("kv_stride is 0"), std::string::npos);
  params.kv_stride = 40;
  EXPECT_NE(refusal().find("q is null"), std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
