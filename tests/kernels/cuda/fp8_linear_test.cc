#include "kernels/cuda/fp8_linear/fp8_linear.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <utility>

#include "absl/types/span.h"
#include "base/tensor_view.h"
#include "kernels/cuda/fp8_linear/paths.h"
#include "kernels/reference/dense.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/launch_comparison.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

int64_t Blocks(int64_t size) { return (size + 127) / 128; }

// Finite codes of both signs, of 16 binades with every mantissa: quick to draw by the million.
std::vector<E4m3> RandomCodes(int64_t count, uint64_t seed) {
  Prng random(seed);
  std::vector<E4m3> codes(static_cast<size_t>(count));
  for (size_t i = 0; i < codes.size(); i += 8) {
    uint64_t bits = random.Next();
    for (size_t j = i; j < std::min(codes.size(), i + 8); ++j, bits >>= 8) {
      const auto code = static_cast<uint8_t>(bits);
      codes[j] = E4m3{(code & 0x7f) == 0x7f ? uint8_t{0x38} : code};
    }
  }
  return codes;
}

// A weight matrix on both sides.
struct Weight {
  Weight(int64_t rows, int64_t cols, uint64_t seed)
      : n(rows), k(cols), codes(RandomCodes(rows * cols, seed)) {
    Prng random(seed + 1);
    scales = RandomFloats(random, static_cast<size_t>(Blocks(n) * Blocks(k)), 1e-3f);
    device_codes = std::make_unique<DeviceBuffer<E4m3>>(codes);
    device_scales = std::make_unique<DeviceBuffer<float>>(scales);
  }
  int64_t n, k;
  std::vector<E4m3> codes;
  std::vector<float> scales;
  std::unique_ptr<DeviceBuffer<E4m3>> device_codes;
  std::unique_ptr<DeviceBuffer<float>> device_scales;
};

struct Rows {
  std::vector<E4m3> codes;    // [m, k]
  std::vector<float> scales;  // [m, blocks]
};

Rows RandomRows(int64_t m, int64_t k, uint64_t seed) {
  Prng random(seed);
  return {RandomCodes(m * k, seed + 1),
          RandomFloats(random, static_cast<size_t>(m * Blocks(k)), 1e-2f)};
}

using Launcher = std::function<absl::Status(const Fp8LinearParams&)>;

absl::Status LaunchIt(const Fp8LinearParams& params) { return LaunchFp8Linear(params, nullptr); }

Fp8LinearParams Params(const Weight& weight) {
  Fp8LinearParams params;
  params.n = params.out_stride = weight.n;
  params.k = weight.k;
  params.weight = weight.device_codes->get();
  params.weight_scales = weight.device_scales->get();
  return params;
}

// Runs the operation on up to `most` rows. Its buffers live as long: cudaFree would wait for a
// competing kernel.
class Runner {
 public:
  Runner(const Weight& weight, int64_t most, int64_t stride = 0)
      : weight_(weight),
        stride_(stride == 0 ? weight.n : stride),
        x_(static_cast<size_t>(most * weight.k)),
        scales_(static_cast<size_t>(most * Blocks(weight.k))),
        out_(static_cast<size_t>(most * stride_)) {}

  void Upload(const Rows& rows) {
    x_.Upload(rows.codes);
    scales_.Upload(rows.scales);
  }
  // Rows first .. first + m - 1 of those uploaded, in calls of `chunk` rows: [m, stride].
  std::vector<Bf16> Run(int64_t first, int64_t m, int64_t chunk, const Launcher& launch) {
    out_.Poison();
    Fp8LinearParams params = Params(weight_);
    params.out_stride = stride_;
    for (int64_t row = 0; row < m; row += chunk) {
      params.m = std::min(chunk, m - row);
      params.x = x_.get() + (first + row) * weight_.k;
      params.x_scales = scales_.get() + (first + row) * Blocks(weight_.k);
      params.out = out_.get() + row * stride_;
      const absl::Status status = launch(params);
      EXPECT_TRUE(status.ok()) << status.ToString();
      if (!status.ok()) break;
    }
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "Fp8Linear");
    std::vector<Bf16> out(static_cast<size_t>(m * stride_));
    ExpectCudaOk(
        cudaMemcpy(out.data(), out_.get(), out.size() * sizeof(Bf16), cudaMemcpyDeviceToHost),
        "download");
    return out;
  }
  std::vector<Bf16> Multiply(const Rows& rows, int64_t m) {
    Upload(rows);
    return Run(0, m, m, LaunchIt);
  }

 private:
  const Weight& weight_;
  int64_t stride_;
  DeviceBuffer<E4m3> x_;
  DeviceBuffer<float> scales_;
  DeviceBuffer<Bf16> out_;
};

// One element by kernels/reference, of the values that codes and scales stand for.
float Element(const Weight& w, const Rows& rows, int64_t row, int64_t column) {
  std::vector<float> x(static_cast<size_t>(w.k));
  for (int64_t i = 0; i < w.k; ++i) {
    x[static_cast<size_t>(i)] = ToFloat(rows.codes[static_cast<size_t>(row * w.k + i)]) *
                                rows.scales[static_cast<size_t>(row * Blocks(w.k) + i / 128)];
  }
  const MatrixView weight_row = {
      DType::kE4m3, 1, w.k,
      reinterpret_cast<const std::byte*>(&w.codes[static_cast<size_t>(column * w.k)]),
      &w.scales[static_cast<size_t>(column / 128 * Blocks(w.k))]};
  float out = 0;
  reference::LinearRow(weight_row, x, absl::MakeSpan(&out, 1));
  return out;
}

class Fp8LinearTest : public GpuTest {};

TEST_F(Fp8LinearTest, AgreesWithTheReferenceAtOddShapes) {
  struct Case {
    int64_t m, n, k, stride;
  };
  for (const Case c :
       {Case{1, 64, 128, 64}, Case{3, 200, 144, 200}, Case{9, 129, 1536, 131},
        Case{17, 2112, 7168, 2112}, Case{33, 65, 400, 65}, Case{64, 384, 256, 392},
        Case{65, 1, 16, 1}, Case{130, 576, 2048, 576}, Case{300, 1000, 1040, 1000},
        Case{130, 4096, 2064, 4096}, Case{1500, 4104, 1040, 4112}, Case{2049, 2112, 7168, 2112},
        Case{700, 1001, 528, 1001}, Case{1100, 24576, 272, 24576},
        // Rings that go round and several tiles a CTA, for each size of tile.
        Case{300, 7168, 2048, 7168}, Case{1024, 7168, 2048, 7168}, Case{4096, 7168, 2048, 7168},
        Case{512, 24576, 1536, 24576}}) {
    const Weight weight(c.n, c.k, 1);
    const Rows rows = RandomRows(c.m, c.k, 2);
    const std::vector<Bf16> out = Runner(weight, c.m, c.stride).Multiply(rows, c.m);
    std::vector<float> found, expected;
    Prng pick(3);
    for (int i = 0; i < 4000; ++i) {
      const int64_t row =
          i < c.m ? i : static_cast<int64_t>(pick.Below(static_cast<uint64_t>(c.m)));
      const int64_t column = static_cast<int64_t>(pick.Below(static_cast<uint64_t>(c.n)));
      found.push_back(ToFloat(out[static_cast<size_t>(row * c.stride + column)]));
      expected.push_back(Element(weight, rows, row, column));
    }
    const double difference = RelativeDifference(found, expected);
    const double worst = WorstElement(found, expected);
    std::printf("%4ld x %5ld x %5ld: difference %.2g, worst element %.2g\n", c.m, c.n, c.k,
                difference, worst);
    EXPECT_LT(difference, 1e-5) << c.m << " x " << c.n << " x " << c.k;  // asked for are 1e-3
    EXPECT_LT(worst, 1.0 / 256) << c.m << " x " << c.n << " x " << c.k;  // BF16 has 8 bits
    // Between the rows nothing was written.
    const Bf16 poison = DeviceBuffer<Bf16>(1).Download()[0];
    for (int64_t row = 0; row < c.m; ++row) {
      for (int64_t i = c.n; i < c.stride; ++i) {
        const Bf16 value = out[static_cast<size_t>(row * c.stride + i)];
        ASSERT_EQ(value.bits, poison.bits) << "row " << row << ", beyond n";
      }
    }
  }
}

TEST_F(Fp8LinearTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  // One with K in segments, one with it whole; the last tile of weight rows is ragged.
  for (const auto& [n, shape_k] : {std::pair<int64_t, int64_t>{1088, 2048}, {1088, 1536}}) {
    const Weight weight(n, shape_k, 4);
    const int64_t k = weight.k;
    const Rows mine = RandomRows(1, k, 5);
    Runner runner(weight, 4096);
    const std::vector<Bf16> alone = runner.Multiply(mine, 1);
    int64_t compared = 0;
    for (const int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 512, 4096}) {
      const CompetingKernel competing;
      Rows rows = RandomRows(m, k, 6 + static_cast<uint64_t>(m));
      // Neighbours of every kind: NaN codes, the largest codes, scales of infinity and NaN.
      for (int64_t row = 0; row < m; ++row) {
        const auto at = static_cast<size_t>(row);
        if (row % 5 == 1) rows.codes[at * static_cast<size_t>(k) + 7] = E4m3{0x7f};
        if (row % 5 == 2) rows.scales[at * static_cast<size_t>(Blocks(k))] = INFINITY;
        if (row % 5 == 3) rows.scales[at * static_cast<size_t>(Blocks(k))] = NAN;
        if (row % 5 == 4) rows.scales[at * static_cast<size_t>(Blocks(k))] = 1e38f;
      }
      // Every place of a small batch; of a large one all places congruent to `place` at once.
      const int64_t step = m > 129 ? 193 : m;
      for (int64_t place = 0; place < step; ++place) {
        Rows now = rows;
        std::vector<int64_t> places;
        for (int64_t p = place; p < m; p += step) places.push_back(p);
        for (const int64_t p : places) {
          std::copy(mine.codes.begin(), mine.codes.end(), now.codes.begin() + p * k);
          std::copy(mine.scales.begin(), mine.scales.end(), now.scales.begin() + p * Blocks(k));
        }
        const std::vector<Bf16> out = runner.Multiply(now, m);
        for (const int64_t p : places) {
          const std::vector<Bf16> row(out.begin() + p * weight.n, out.begin() + (p + 1) * weight.n);
          ASSERT_EQ(HashOf(row), HashOf(alone)) << "m = " << m << ", place " << p;
          compared += weight.n;
        }
      }
      EXPECT_TRUE(competing.Runs()) << "m = " << m;
    }
    std::printf("K in %d segments: %ld values compared\n", Fp8LinearSegments(n, k), compared);
    EXPECT_EQ(Fp8LinearSegments(n, k) > 1, k == 2048);
  }
}

// 4,096 rows in one call, against the same rows in calls of `chunk` rows, standing `shift` places
// further on (cyclically). Some rows hold NaN codes and infinite scales: their bits count too.
class Whole {
 public:
  explicit Whole(const Weight& weight) : weight_(weight), runner_(weight, 2 * kRows) {
    Rows rows = RandomRows(kRows, weight.k, 11);
    for (size_t row = 0; row < kRows; row += 64) {
      rows.codes[row * static_cast<size_t>(weight.k) + 5] = E4m3{0xff};
      rows.scales[(row + 9) * static_cast<size_t>(Blocks(weight.k))] = -INFINITY;
    }
    // Twice in a row, so that turned ones are a part of them.
    rows.codes.resize(2 * rows.codes.size());
    std::copy_n(rows.codes.begin(), rows.codes.size() / 2,
                rows.codes.begin() + static_cast<int64_t>(rows.codes.size() / 2));
    rows.scales.resize(2 * rows.scales.size());
    std::copy_n(rows.scales.begin(), rows.scales.size() / 2,
                rows.scales.begin() + static_cast<int64_t>(rows.scales.size() / 2));
    runner_.Upload(rows);
    expected_ = runner_.Run(0, kRows, kRows, LaunchIt);
  }

  // Rows that differ, of kRows.
  int64_t Different(int64_t chunk, int64_t shift, const Launcher& launch) {
    const std::vector<Bf16> found = runner_.Run((kRows - shift) % kRows, kRows, chunk, launch);
    const auto row_bytes = static_cast<size_t>(weight_.n) * sizeof(Bf16);
    int64_t different = 0;
    for (int64_t row = 0; row < kRows; ++row) {
      different +=
          Hash64(&found[static_cast<size_t>((row + shift) % kRows * weight_.n)], row_bytes) !=
          Hash64(&expected_[static_cast<size_t>(row * weight_.n)], row_bytes);
    }
    compared_ += kRows * weight_.n;
    return different;
  }
  int64_t compared() const { return compared_; }

 private:
  static constexpr int64_t kRows = 4096;

  const Weight& weight_;
  Runner runner_;
  std::vector<Bf16> expected_;
  int64_t compared_ = 0;
};

TEST_F(Fp8LinearTest, ChunksOfACallGiveTheBitsOfTheWhole) {
  int64_t compared = 0;
  // K in three segments, in two, and whole: calls of 256 and 1,024 rows have other tiles than 512.
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{2112, 7168}, {4096, 2048}, {7168, 2048}}) {
    const Weight weight(n, k, 12);
    Whole whole(weight);
    for (const int64_t chunk : {1, 16, 63, 256, 512, 1024}) {
      const CompetingKernel competing;
      for (const int64_t shift : {0, 1, 1367}) {
        if (n != 2112 && shift != 0) continue;
        EXPECT_EQ(whole.Different(chunk, shift, LaunchIt), 0)
            << n << " x " << k << ", calls of " << chunk << " rows, " << shift << " places on";
      }
      EXPECT_TRUE(competing.Runs());
    }
    compared += whole.compared();
  }
  std::printf("%ld values compared\n", compared);
  EXPECT_GE(compared, 100'000'000);
}

TEST_F(Fp8LinearTest, SegmentsThatFollowTheBatchWouldBeSeen) {
  const Weight weight(2112, 7168, 13);
  Whole whole(weight);
  const int segments = Fp8LinearSegments(weight.n, weight.k);
  const auto by_batch = [&](const Fp8LinearParams& params) {
    return LaunchFp8LinearSmall(params, params.m <= 16 ? 2 * segments : segments, nullptr);
  };
  EXPECT_EQ(whole.Different(64, 0, by_batch), 0) << "the segments of the operation itself";
  // Rounding to BF16 hides most of it: 761 rows were seen.
  EXPECT_GT(whole.Different(16, 0, by_batch), 100) << "of 4096 rows";
}

TEST_F(Fp8LinearTest, LaunchesBesideACompetingKernelAgree) {
  // Few rows; many, and from eight tiles of tokens on by clusters.
  const Weight weight(1344, 2048, 8);
  for (const int64_t m : {3, 64, 850, 1100}) {
    SCOPED_TRACE(m);
    const Rows rows = RandomRows(m, weight.k, 9);
    const DeviceBuffer<E4m3> x(rows.codes);
    const DeviceBuffer<float> x_scales(rows.scales);
    const auto size = static_cast<size_t>(m * weight.n);
    const DeviceBuffer<Bf16> out(size), other(size);
    Fp8LinearParams params = Params(weight);
    params.m = m;
    params.x = x.get();
    params.x_scales = x_scales.get();
    int64_t launches = 0;
    ExpectEqualLaunches({{{{out.get(), 2 * size}}, {{other.get(), 2 * size}}}},
                        [&](int set, cudaStream_t stream) {
                          // Beside the launch in front, or after it: each half of the launches into
                          // either set.
                          params.weights_resident = ++launches / 2 % 2 == 1;
                          params.out = set == 0 ? out.get() : other.get();
                          return LaunchFp8Linear(params, stream);
                        });
  }
}

// The kernel in front lets the next one start at once and writes late what that one reads.
TEST_F(Fp8LinearTest, WhatTheKernelInFrontWritesIsWaitedFor) {
  const Weight weight(4096, 2048, 14), other(4096, 2048, 17);
  for (const int64_t m : {1, 64, 1024}) {
    const Rows rows = RandomRows(m, weight.k, 16), before = RandomRows(m, weight.k, 15);
    const std::vector<Bf16> expected = Runner(weight, m).Multiply(rows, m);
    const DeviceBuffer<E4m3> x(rows.codes), early_x(before.codes), early_weight(other.codes);
    const DeviceBuffer<float> x_scales(rows.scales), early_x_scales(before.scales),
        early_weight_scales(other.scales);
    const DeviceBuffer<Bf16> out(static_cast<size_t>(m * weight.n));
    Fp8LinearParams params = Params(weight);
    params.m = m;
    params.x = x.get();
    params.x_scales = x_scales.get();
    params.out = out.get();
    const auto run_behind_copy = [&](void* to, const void* early, size_t bytes, const char* what) {
      const DeviceBuffer<uint8_t> late(bytes);
      ASSERT_CUDA_OK(cudaMemcpy(late.get(), to, bytes, cudaMemcpyDeviceToDevice));
      ASSERT_CUDA_OK(cudaMemcpy(to, early, bytes, cudaMemcpyDeviceToDevice));
      LaunchSlowCopy(to, late.get(), bytes, nullptr);
      ASSERT_STATUS_OK(LaunchIt(params));
      ExpectCudaOk(cudaDeviceSynchronize(), "Fp8Linear");
      EXPECT_EQ(HashOf(out.Download()), HashOf(expected)) << "m = " << m << ", " << what;
    };
    for (const bool resident : {false, true}) {
      params.weights_resident = resident;
      run_behind_copy(x.get(), early_x.get(), x.count(), "rows");
      run_behind_copy(x_scales.get(), early_x_scales.get(), 4 * x_scales.count(), "their scales");
    }
    params.weights_resident = false;
    run_behind_copy(weight.device_codes->get(), early_weight.get(), weight.codes.size(), "weights");
    run_behind_copy(weight.device_scales->get(), early_weight_scales.get(),
                    4 * weight.scales.size(), "scales of the weights");
  }
}

TEST_F(Fp8LinearTest, ShapesThatItCannotTakeAreRefusedByName) {
  EXPECT_TRUE(LaunchIt({}).ok()) << "no rows";
  const Weight weight(64, 128, 1);
  const DeviceBuffer<E4m3> x(256);
  const DeviceBuffer<float> x_scales(2);
  const DeviceBuffer<Bf16> out(128);
  Fp8LinearParams good = Params(weight);
  good.m = 1;
  good.x = x.get();
  good.x_scales = x_scales.get();
  good.out = out.get();
  const auto expect_refused = [&](const char* name, auto change) {
    Fp8LinearParams bad = good;
    change(bad);
    const absl::Status status = LaunchIt(bad);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_NE(status.message().find(name), absl::string_view::npos) << status.ToString();
  };
  expect_refused("m is -1", [](Fp8LinearParams& p) { p.m = -1; });
  expect_refused("n is 0", [](Fp8LinearParams& p) { p.n = 0; });
  expect_refused("k is 120", [](Fp8LinearParams& p) { p.k = 120; });
  expect_refused("out_stride is 63", [](Fp8LinearParams& p) { p.out_stride = 63; });
  expect_refused("x is not aligned", [](Fp8LinearParams& p) { p.x += 8; });
  expect_refused("weight is null", [](Fp8LinearParams& p) { p.weight = nullptr; });
  expect_refused("x_scales is null", [](Fp8LinearParams& p) { p.x_scales = nullptr; });
  expect_refused("weight_scales is not aligned", [](Fp8LinearParams& p) {
    p.weight_scales =
        reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(p.weight_scales) + 2);
  });
  expect_refused("out is null", [](Fp8LinearParams& p) { p.out = nullptr; });
}

// The kernel in front lets the next one start at once and reads late what that one overwrites.
TEST_F(Fp8LinearTest, OutputsAreLeftAloneUntilTheKernelInFrontHasReadThem) {
  for (const int64_t n : {512, 4096, 4288}) {  // K in 8 segments, 2, 1
    const Weight weight(n, 2048, 18);
    for (const int64_t m : {1, 64, 1024}) {
      const Rows rows = RandomRows(m, weight.k, 19);
      const DeviceBuffer<E4m3> x(rows.codes);
      const DeviceBuffer<float> x_scales(rows.scales);
      DeviceBuffer<Bf16> out(static_cast<size_t>(m * n));
      Fp8LinearParams params = Params(weight);
      params.m = m;
      params.x = x.get();
      params.x_scales = x_scales.get();
      params.out = out.get();
      for (const bool resident : {false, true}) {
        params.weights_resident = resident;
        ASSERT_STATUS_OK(LaunchIt(params));  // a first launch may wait for others
        const uint64_t expected = HashOf(out.Download());
        const LateReader reader(out.get(), out.count() * sizeof(Bf16));
        ASSERT_STATUS_OK(LaunchIt(params));
        EXPECT_TRUE(reader.FoundTheFilling()) << "n = " << n << ", m = " << m;
        EXPECT_EQ(HashOf(out.Download()), expected) << "n = " << n << ", m = " << m;
      }
    }
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
