// Kernels that choose a tile, or how many warps share a block, by the size of a call: calls of
// every choice, ragged at their ends, give rows the bits that they have alone. The shapes are as
// small as the choice allows, so that a sanitizer gets through them.

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cuda/bf16_linear/bf16_linear.h"
#include "kernels/cuda/fp8_linear/fp8_linear.h"
#include "kernels/cuda/gate_select/gate_select.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

int64_t Blocks(int64_t size) { return (size + 127) / 128; }

class TileChoiceTest : public GpuTest {};

// The first, some middle and the last row of a call.
std::vector<int64_t> SomeRows(int64_t m) {
  std::vector<int64_t> rows = {0, m / 3, m / 2, m - 1};
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  return rows;
}

// Expects row `row` of `all`, [m, stride], to begin with the values of `alone`.
template <typename T>
void ExpectRow(const std::vector<T>& all, int64_t row, int64_t stride, const std::vector<T>& alone,
               const char* what) {
  EXPECT_EQ(std::memcmp(all.data() + row * stride, alone.data(), alone.size() * sizeof(T)), 0)
      << what << ", row " << row;
}

TEST_F(TileChoiceTest, Fp8LinearRowsHaveTheBitsOfRowsAlone) {
  struct Case {
    int64_t n, k, stride;
    std::vector<int64_t> m;
  };
  const std::vector<int64_t> few = {1, 8, 9, 16, 17, 32, 33, 64, 65, 128};
  for (const Case& c :
       {// few rows: weight tiles of 64, 128 and 192, K whole and in 6 and 3 segments
        Case{200, 144, 200, few}, Case{8600, 144, 8601, few}, Case{17001, 144, 17001, few},
        Case{200, 2064, 200, few}, Case{1100, 2064, 1100, {1, 9, 65}},
        Case{4232, 8192, 4232, {1, 20, 64}}, Case{5640, 8192, 5640, {1, 20, 64}},
        // many: 128 x 128, 128 x 192 and 256 x 128 tiles, without and with clusters of two
        Case{4096, 144, 4096, {300}}, Case{2000, 144, 2000, {1000}}, Case{6200, 144, 6200, {500}},
        Case{3064, 144, 3064, {1020}}, Case{5600, 144, 5600, {700}}, Case{2040, 144, 2048, {2040}},
        // the same with K in segments
        Case{1600, 1936, 1600, {700, 1000}}, Case{2496, 1936, 2496, {800, 1000}}}) {
    Prng random(static_cast<uint64_t>(c.n + c.k));
    const int64_t most = c.m.back();
    std::vector<E4m3> values = RandomE4m3(random, 1'000'003);  // repeated: drawing takes long
    values.resize(static_cast<size_t>(c.n * c.k));
    for (size_t i = 1'000'003; i < values.size(); ++i) values[i] = values[i - 1'000'003];
    const DeviceBuffer<E4m3> weight(values);
    const DeviceBuffer<float> weight_scales(
        RandomFloats(random, static_cast<size_t>(Blocks(c.n) * Blocks(c.k)), 1e-2f));
    const DeviceBuffer<E4m3> x(RandomE4m3(random, static_cast<size_t>(most * c.k)));
    const DeviceBuffer<float> x_scales(
        RandomFloats(random, static_cast<size_t>(most * Blocks(c.k)), 1e-2f));
    const auto multiply = [&](int64_t first, int64_t m) {
      const DeviceBuffer<Bf16> out(static_cast<size_t>(m * c.stride));
      Fp8LinearParams params;
      params.m = m;
      params.n = c.n;
      params.k = c.k;
      params.x = x.get() + first * c.k;
      params.x_scales = x_scales.get() + first * Blocks(c.k);
      params.weight = weight.get();
      params.weight_scales = weight_scales.get();
      params.out = out.get();
      params.out_stride = c.stride;
      const absl::Status status = LaunchFp8Linear(params, nullptr);
      EXPECT_TRUE(status.ok()) << status.ToString();
      return out.Download();
    };
    for (const int64_t m : c.m) {
      const std::vector<Bf16> all = multiply(0, m);
      for (const int64_t row : SomeRows(m))
        ExpectRow(all, row, c.stride, multiply(row, 1), "fp8_linear");
    }
  }
}

TEST_F(TileChoiceTest, Bf16LinearRowsHaveTheBitsOfRowsAlone) {
  struct Case {
    int64_t n, k, heads;
    bool transposed;
  };
  for (const Case c :
       {Case{200, 72, 1, false}, Case{24860, 72, 1, false}, Case{300, 1032, 1, false},
        Case{120, 128, 2, false}, Case{72, 128, 2, true}, Case{520, 64, 3, true},
        // stored in bulk: heads that end with a tile, and within one
        Case{128, 512, 2, false}, Case{512, 128, 2, true}, Case{64, 128, 3, false},
        Case{192, 128, 3, true},
        // segments that are streamed
        Case{7168, 1024, 1, false}}) {
    Prng random(static_cast<uint64_t>(c.n + c.k));
    const int64_t most = 130, x_stride = c.heads * c.k, out_stride = c.heads * c.n;
    const int64_t weight_stride = c.transposed ? c.n : c.k;
    const DeviceBuffer<Bf16> weight(RandomBf16(random, static_cast<size_t>(c.heads * c.n * c.k)));
    const DeviceBuffer<Bf16> x(RandomBf16(random, static_cast<size_t>(most * x_stride)));
    const auto multiply = [&](int64_t first, int64_t m) {
      const DeviceBuffer<Bf16> out(static_cast<size_t>(m * out_stride));
      Bf16LinearParams params;
      params.m = m;
      params.n = c.n;
      params.k = c.k;
      params.heads = c.heads;
      params.x = x.get() + first * x_stride;
      params.x_stride = x_stride;
      params.x_head_stride = c.k;
      params.weight = weight.get();
      params.weight_stride = weight_stride;
      params.weight_head_stride = c.n * c.k;
      params.weight_transposed = c.transposed;
      params.out_bf16 = out.get();
      params.out_stride = out_stride;
      params.out_head_stride = c.n;
      const absl::Status status = LaunchBf16Linear(params, nullptr);
      EXPECT_TRUE(status.ok()) << status.ToString();
      return out.Download();
    };
    for (const int64_t m : {1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 130}) {
      const std::vector<Bf16> all = multiply(0, m);
      for (const int64_t row : SomeRows(m))
        ExpectRow(all, row, out_stride, multiply(row, 1), "bf16_linear");
    }
  }
}

TEST_F(TileChoiceTest, GateSelectRowsHaveTheBitsOfRowsAlone) {
  for (const int32_t experts : {32, 64, 96, 128, 160, 256, 288, 384, 512}) {
    for (const int32_t groups : {1, 8, experts / 8}) {
      GateConfig config;
      config.n_routed_experts = experts;
      config.num_experts_per_tok = 8;
      config.n_group = groups;
      config.topk_group = std::max(1, groups / 2);
      const int64_t most = 1203;
      Prng random(static_cast<uint64_t>(experts + groups));
      const DeviceBuffer<float> logits(RandomFloats(random, static_cast<size_t>(most * experts)));
      const DeviceBuffer<float> bias(RandomFloats(random, static_cast<size_t>(experts), 0.1f));
      const auto select = [&](int64_t first, int64_t m) {
        const DeviceBuffer<uint32_t> chosen(static_cast<size_t>(m * 8));
        const DeviceBuffer<float> weights(static_cast<size_t>(m * 8));
        GateSelectParams params;
        params.m = m;
        params.config = config;
        params.logits = logits.get() + first * experts;
        params.bias = bias.get();
        params.experts = reinterpret_cast<ExpertId*>(chosen.get());
        params.weights = weights.get();
        const absl::Status status = LaunchGateSelect(params, nullptr);
        EXPECT_TRUE(status.ok()) << status.ToString();
        return std::make_pair(chosen.Download(), weights.Download());
      };
      for (const int64_t m : {int64_t{7}, most}) {
        const auto [chosen, weights] = select(0, m);
        for (const int64_t row : SomeRows(m)) {
          const auto [its_choice, its_weights] = select(row, 1);
          ExpectRow(chosen, row, 8, its_choice, "experts of gate_select");
          ExpectRow(weights, row, 8, its_weights, "weights of gate_select");
        }
      }
    }
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
