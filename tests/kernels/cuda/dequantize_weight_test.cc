// The BF16 weight made on the device has the bits of the one that the host makes
// (model/quantize.h), for every code and any scale, at any shape and alignment.

#include "kernels/cuda/dequantize_weight/dequantize_weight.h"

#include <bit>
#include <cfloat>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "model/quantize.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

template <typename T>
absl::Span<const std::byte> Bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

int64_t Blocks(int64_t count) { return (count + 127) / 128; }

struct Weight {
  int64_t n, k;
  std::vector<E4m3> codes;
  std::vector<float> scales;
};

// Codes of all kinds, scales of both signs over the whole range of float32.
Weight RandomWeight(int64_t n, int64_t k) {
  Prng random(static_cast<uint64_t>(n * 31 + k));
  Weight w{n, k, std::vector<E4m3>(static_cast<size_t>(n * k)), {}};
  for (E4m3& code : w.codes) code.bits = static_cast<uint8_t>(random.Next());
  while (static_cast<int64_t>(w.scales.size()) < Blocks(n) * Blocks(k)) {
    const float scale = std::bit_cast<float>(static_cast<uint32_t>(random.Next()));
    if (std::isfinite(scale)) w.scales.push_back(scale);
  }
  return w;
}

std::vector<Bf16> OnHost(const Weight& w) {
  return model::DequantizeMatrix(Bytes(w.codes), Bytes(w.scales), w.n, w.k);
}

// With `offset` codes before the first and as many elements before the result.
std::vector<Bf16> OnDevice(const Weight& w, int64_t offset = 0) {
  std::vector<E4m3> moved(static_cast<size_t>(offset));
  moved.insert(moved.end(), w.codes.begin(), w.codes.end());
  const DeviceBuffer<E4m3> codes(moved);
  const DeviceBuffer<float> scales(w.scales);
  const DeviceBuffer<Bf16> out(moved.size());
  DequantizeWeightParams params;
  params.n = w.n;
  params.k = w.k;
  params.weight = codes.get() + offset;
  params.weight_scales = scales.get();
  params.out = out.get() + offset;
  const absl::Status status = LaunchDequantizeWeight(params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "DequantizeWeight");
  const std::vector<Bf16> all = out.Download();
  for (int64_t i = 0; i < offset; ++i) EXPECT_EQ(all[static_cast<size_t>(i)].bits, 0xcdcd);
  return {all.begin() + offset, all.end()};
}

// The first element that differs, by its place and bits; empty if none does.
std::string FirstDifference(const std::vector<Bf16>& found, const std::vector<Bf16>& expected,
                            int64_t k) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i]) continue;
    const auto at = static_cast<int64_t>(i);
    return absl::StrCat("[", at / k, ", ", at % k, "] is ", found[i].bits, ", expected ",
                        expected[i].bits);
  }
  return found.size() == expected.size() ? "" : "sizes differ";
}

class DequantizeWeightTest : public GpuTest {};

TEST_F(DequantizeWeightTest, EveryCodeTimesScalesOfAllKindsIsTheHosts) {
  // Row block s has scales[s] and codes 0 .. 255 in every row.
  const std::vector<float> scales = {1.0f, 1.0f / 448.0f, 0.0173f, 3e-4f, -2.5f, 0.0f, -0.0f,
                                     // products that are subnormal, in float32 or only in BF16
                                     FLT_MIN, FLT_MIN / 3, 1e-40f, 3 * FLT_TRUE_MIN, FLT_TRUE_MIN,
                                     7.5e-39f * 512, 1.17e-38f * 600,
                                     // products that overflow, some only when they are rounded
                                     FLT_MAX, FLT_MAX / 448, 7.6e35f, 1e37f, -FLT_MAX / 3};
  Weight w{static_cast<int64_t>(scales.size()) * 128, 256, {}, {}};
  for (int64_t i = 0; i < w.n * w.k; ++i) w.codes.push_back(E4m3{static_cast<uint8_t>(i % 256)});
  for (const float scale : scales) w.scales.insert(w.scales.end(), 2, scale);
  const std::vector<Bf16> expected = OnHost(w);
  EXPECT_EQ(FirstDifference(OnDevice(w), expected, w.k), "");
  EXPECT_EQ(FirstDifference(OnDevice(w, 1), expected, w.k), "") << "not aligned";
  EXPECT_EQ(expected[0x7f].bits, 0x7fc0);
  EXPECT_EQ(expected[0xff].bits, 0xffc0);
}

TEST_F(DequantizeWeightTest, AScaleThatIsNoNumberSpoilsItsBlockOnly) {
  Weight w{130, 300, std::vector<E4m3>(130 * 300), std::vector<float>(6, 0.5f)};
  for (size_t i = 0; i < w.codes.size(); ++i) w.codes[i].bits = static_cast<uint8_t>(i % 256);
  w.scales[1] = std::numeric_limits<float>::quiet_NaN();
  w.scales[3] = -std::numeric_limits<float>::infinity();
  const std::vector<Bf16> found = OnDevice(w), expected = OnHost(w);
  for (size_t i = 0; i < found.size(); ++i) {
    if (std::isnan(ToFloat(expected[i]))) {
      ASSERT_TRUE(std::isnan(ToFloat(found[i]))) << i;
    } else {
      ASSERT_EQ(found[i].bits, expected[i].bits) << i;
    }
  }
}

TEST_F(DequantizeWeightTest, OddShapesAndAlignmentsAreTheHosts) {
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 1},
                                                                     {1, 8},
                                                                     {3, 7},
                                                                     {2, 513},
                                                                     {5, 1024},
                                                                     {17, 128},
                                                                     {127, 129},
                                                                     {128, 128},
                                                                     {129, 127},
                                                                     {131, 264},
                                                                     {300, 520},
                                                                     {257, 1000},
                                                                     {16, 1028}}) {
    const Weight w = RandomWeight(n, k);
    const std::vector<Bf16> expected = OnHost(w);
    for (const int64_t offset : {0, 8, 3})
      EXPECT_EQ(FirstDifference(OnDevice(w, offset), expected, k), "") << n << " x " << k;
  }
}

TEST_F(DequantizeWeightTest, LaunchesOfKvBBesideACompetingKernelAgreeWithTheHost) {
  const Weight w = RandomWeight(32768, 512);
  const uint64_t expected = HashOf(OnHost(w));
  const CompetingKernel competing;
  for (int repeat = 0; repeat < 3; ++repeat) EXPECT_EQ(HashOf(OnDevice(w)), expected);
  EXPECT_TRUE(competing.Runs());
}

TEST_F(DequantizeWeightTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  DequantizeWeightParams params;
  EXPECT_TRUE(LaunchDequantizeWeight(params, nullptr).ok()) << "no rows";
  params.n = 2;
  EXPECT_TRUE(LaunchDequantizeWeight(params, nullptr).ok()) << "no columns";
  const auto refusal = [&] {
    return std::string(LaunchDequantizeWeight(params, nullptr).message());
  };
  const DeviceBuffer<float> memory(64);
  params.k = -1;
  EXPECT_NE(refusal().find("k is -1"), std::string::npos);
  params.k = 8;
  EXPECT_NE(refusal().find("weight is null"), std::string::npos);
  params.weight = reinterpret_cast<const E4m3*>(memory.get());
  EXPECT_NE(refusal().find("weight_scales is null"), std::string::npos);
  params.weight_scales = memory.get();
  EXPECT_NE(refusal().find("out is null"), std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
