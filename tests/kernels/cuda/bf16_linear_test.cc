#include "kernels/cuda/bf16_linear/bf16_linear.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/tensor_view.h"
#include "kernels/reference/dense.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/launch_comparison.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

// A product as the kernels of a layer use it: its shape and the strides of its three matrices.
struct Form {
  int64_t n, k;
  bool f32 = false;
  int64_t heads = 1;
  bool transposed = false;
  int64_t x_head_stride = 0;  // the row stride is at least the end of the last head's part
  int64_t x_padding = 0;      // more elements in a row
  int64_t weight_rows_per_head = 0;
  int64_t out_head_stride = 0;
  int64_t out_padding = 0;

  int64_t XStride() const { return (heads - 1) * x_head_stride + k + x_padding; }
  int64_t OutStride() const { return (heads - 1) * out_head_stride + n + out_padding; }
  int64_t WeightCols() const { return transposed ? n : k; }
  int64_t WeightRows() const { return (heads - 1) * weight_rows_per_head + (transposed ? k : n); }
};

// kv_b [heads * (128 + 128), 512]: queries into the latent space (the rows of k_nope, contracted),
// and outputs out of it (the rows of v).
Form QueryAbsorb(int64_t heads) {
  return {.n = 512,
          .k = 128,
          .heads = heads,
          .transposed = true,
          .x_head_stride = 192,
          .x_padding = 64,
          .weight_rows_per_head = 256,
          .out_head_stride = 576,
          .out_padding = 64};
}
Form OutputAbsorb(int64_t heads) {
  return {.n = 128,
          .k = 512,
          .heads = heads,
          .x_head_stride = 512,
          .weight_rows_per_head = 256,
          .out_head_stride = 128};
}

class Product {
 public:
  Product(const Form& form, uint64_t seed)
      : form_(form), weights_(Draw(form, seed)), device_weights_(weights_) {}

  const Form& form() const { return form_; }
  std::vector<Bf16> RandomRows(int64_t m, uint64_t seed) const {
    Prng random(seed);
    return RandomBf16(random, static_cast<size_t>(m * form_.XStride()));
  }

  Bf16LinearParams Params(int64_t m, const Bf16* x, void* out) const {
    Bf16LinearParams params;
    params.m = m;
    params.n = form_.n;
    params.k = form_.k;
    params.heads = form_.heads;
    params.x = x;
    params.x_stride = (form_.XStride() + 7) / 8 * 8;
    params.x_head_stride = form_.x_head_stride;
    params.weight = device_weights_.get();
    params.weight_stride = form_.WeightCols();
    params.weight_head_stride = form_.weight_rows_per_head * form_.WeightCols();
    params.weight_transposed = form_.transposed;
    if (form_.f32) {
      params.out_f32 = static_cast<float*>(out);
    } else {
      params.out_bf16 = static_cast<Bf16*>(out);
    }
    params.out_stride = form_.OutStride();
    params.out_head_stride = form_.out_head_stride;
    return params;
  }

  // out as bits, [m, OutStride()]: of float32 or of BF16. What lies between heads stays poison.
  std::vector<uint32_t> Multiply(const std::vector<Bf16>& rows, int64_t m) const {
    return Multiply(DeviceBuffer<Bf16>(rows), m);
  }
  std::vector<uint32_t> Multiply(const DeviceBuffer<Bf16>& x, int64_t m) const {
    const size_t count = static_cast<size_t>(m * form_.OutStride());
    if (form_.f32) {
      const DeviceBuffer<uint32_t> out(count);
      Launch(Params(m, x.get(), out.get()));
      return out.Download();
    }
    const DeviceBuffer<uint16_t> out(count);
    Launch(Params(m, x.get(), out.get()));
    const std::vector<uint16_t> bits = out.Download();
    return {bits.begin(), bits.end()};
  }
  float Value(uint32_t bits) const {
    return form_.f32 ? std::bit_cast<float>(bits) : ToFloat(Bf16{static_cast<uint16_t>(bits)});
  }

  // One element by kernels/reference.
  float Element(const std::vector<Bf16>& rows, int64_t row, int64_t head, int64_t column) const {
    const int64_t first = head * form_.weight_rows_per_head;
    std::vector<float> x(static_cast<size_t>(form_.k));
    std::vector<Bf16> weight_row(x.size());
    for (int64_t i = 0; i < form_.k; ++i) {
      const int64_t at =
          form_.transposed ? (first + i) * form_.n + column : (first + column) * form_.k + i;
      weight_row[static_cast<size_t>(i)] = weights_[static_cast<size_t>(at)];
      x[static_cast<size_t>(i)] = ToFloat(
          rows[static_cast<size_t>(row * form_.XStride() + head * form_.x_head_stride + i)]);
    }
    float out = 0;
    reference::LinearRow(
        {DType::kBf16, 1, form_.k, reinterpret_cast<const std::byte*>(weight_row.data())}, x,
        absl::MakeSpan(&out, 1));
    return out;
  }

 private:
  static std::vector<Bf16> Draw(const Form& form, uint64_t seed) {
    Prng random(seed);
    return RandomBf16(random, static_cast<size_t>(form.WeightRows() * form.WeightCols()), 0.05f);
  }
  static void Launch(const Bf16LinearParams& params) {
    const absl::Status status = LaunchBf16Linear(params, nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "Bf16Linear");
  }

  Form form_;
  std::vector<Bf16> weights_;
  DeviceBuffer<Bf16> device_weights_;
};

int Segments(const Form& form) { return form.heads == 1 ? Bf16LinearSegments(form.n, form.k) : 1; }

class Bf16LinearTest : public GpuTest {};

TEST_F(Bf16LinearTest, AgreesWithTheReferenceAtOddShapes) {
  struct Case {
    int64_t m;
    Form form;
  };
  for (const Case& c : {Case{1, {.n = 64, .k = 64}},
                        Case{1, {.n = 1, .k = 8}},
                        Case{3, {.n = 200, .k = 72, .f32 = true}},
                        Case{9, {.n = 129, .k = 1544, .x_padding = 16, .out_padding = 3}},
                        Case{128, {.n = 256, .k = 7168, .f32 = true}},
                        Case{17, {.n = 256, .k = 7168}},
                        Case{300, {.n = 256, .k = 7168, .f32 = true}},
                        Case{5, {.n = 250, .k = 14336, .f32 = true}},
                        Case{33, {.n = 1500, .k = 520, .f32 = true, .out_padding = 4}},
                        Case{65, {.n = 7168, .k = 1024, .out_padding = 8}},
                        Case{70, {.n = 24960, .k = 448, .f32 = true}},
                        Case{200, {.n = 24850, .k = 328, .out_padding = 1}},
                        Case{600, {.n = 1000, .k = 1040}},
                        Case{1, QueryAbsorb(16)},
                        Case{50, QueryAbsorb(3)},
                        Case{130, QueryAbsorb(16)},
                        Case{1, OutputAbsorb(16)},
                        Case{50, OutputAbsorb(3)},
                        Case{130, OutputAbsorb(16)},
                        Case{5,
                             {.n = 72,
                             .k = 64,
                             .heads = 2,
                             .transposed = true,
                             .x_head_stride = 64,
                             .weight_rows_per_head = 64,
                             .out_head_stride = 75}},
                        Case{20,
                             {.n = 300,
                             .k = 128,
                             .f32 = true,
                             .heads = 5,
                             .x_head_stride = 128,
                             .weight_rows_per_head = 300,
                             .out_head_stride = 300}}}) {
    const Product product(c.form, 1);
    const Form& form = product.form();
    const std::vector<Bf16> rows = product.RandomRows(c.m, 2);
    const std::vector<uint32_t> out = product.Multiply(rows, c.m);
    std::vector<float> found, expected;
    Prng pick(3);
    for (int i = 0; i < 3000; ++i) {
      const int64_t row =
          i < c.m ? i : static_cast<int64_t>(pick.Below(static_cast<uint64_t>(c.m)));
      const int64_t head = static_cast<int64_t>(pick.Below(static_cast<uint64_t>(form.heads)));
      const int64_t column = static_cast<int64_t>(pick.Below(static_cast<uint64_t>(form.n)));
      found.push_back(product.Value(
          out[static_cast<size_t>(row * form.OutStride() + head * form.out_head_stride + column)]));
      expected.push_back(product.Element(rows, row, head, column));
    }
    const double difference = RelativeDifference(found, expected);
    const double worst = WorstElement(found, expected);
    std::printf("%4ld x %5ld x %4ld, %2ld heads: difference %.2g, worst element %.2g\n", c.m,
                form.n, form.k, form.heads, difference, worst);
    EXPECT_LT(worst, form.f32 ? 1e-4 : 1.0 / 256) << c.m << " x " << form.n << " x " << form.k;
    EXPECT_LT(difference, form.f32 ? 1e-9 : 1e-5) << c.m << " x " << form.n << " x " << form.k;
    // Nothing but the product is written.
    const uint32_t poison = form.f32 ? 0xcdcdcdcdu : 0xcdcdu;
    for (int64_t at = 0; at < c.m * form.OutStride(); ++at) {
      const int64_t column = at % form.OutStride();
      const bool last = form.heads == 1 || column >= form.heads * form.out_head_stride;
      const int64_t within = form.heads == 1 ? column : column % form.out_head_stride;
      if (within >= form.n || (last && form.heads > 1)) {
        ASSERT_EQ(out[static_cast<size_t>(at)], poison) << "row " << at / form.OutStride();
      }
    }
  }
}

TEST_F(Bf16LinearTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  const uint16_t kOddities[] = {0x7fc0, 0xff80, 0x7f80, 0x7f7f, 0xff7f, 0x8000, 0x0001};
  for (const Form& form : {Form{.n = 256, .k = 7168, .f32 = true}, Form{.n = 1088, .k = 1000},
                           Form{.n = 1090, .k = 440}, QueryAbsorb(4), OutputAbsorb(4)}) {
    const Product product(form, 4);
    const int64_t x_stride = form.XStride(), out_stride = form.OutStride();
    const std::vector<Bf16> mine = product.RandomRows(1, 5);
    const std::vector<uint32_t> alone = product.Multiply(mine, 1);
    {
      // More memory for the pool would wait for the competing kernel.
      const DeviceBuffer<Bf16> of_rows(static_cast<size_t>(4096 * x_stride));
      const DeviceBuffer<float> of_out(static_cast<size_t>(4096 * out_stride));
    }
    int64_t compared = 0;
    for (const int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 512, 4096}) {
      const CompetingKernel competing;
      std::vector<Bf16> rows(static_cast<size_t>(m * x_stride));
      Prng random(6 + static_cast<uint64_t>(m));
      uint64_t bits = 0;
      for (size_t i = 0; i < rows.size(); ++i, bits >>= 16) {
        if (i % 4 == 0) bits = random.Next();
        rows[i].bits = static_cast<uint16_t>(bits);  // any at all
      }
      for (int64_t row = 1; row < m; row += 3) {
        std::fill_n(rows.begin() + row * x_stride, x_stride, Bf16{kOddities[(row / 3) % 7]});
      }
      const DeviceBuffer<Bf16> x(rows);
      // At every place; in large batches at all places congruent to `place` at once.
      for (int64_t place = 0; place < std::min<int64_t>(m, 61); ++place) {
        std::vector<int64_t> places;
        for (int64_t p = place; p < m; p += 61) places.push_back(p);
        const auto put = [&](int64_t p, const Bf16* row) {
          ExpectCudaOk(
              cudaMemcpy(x.get() + p * x_stride, row, static_cast<size_t>(x_stride) * sizeof(Bf16),
                         cudaMemcpyHostToDevice),
              "row");
        };
        for (const int64_t p : places) put(p, mine.data());
        const std::vector<uint32_t> out = product.Multiply(x, m);
        for (const int64_t p : places) {
          ASSERT_TRUE(std::equal(alone.begin(), alone.end(), out.begin() + p * out_stride))
              << "m = " << m << ", place " << p;
          compared += form.n * form.heads;
          put(p, rows.data() + p * x_stride);
        }
      }
      EXPECT_TRUE(competing.Runs()) << "m = " << m;
    }
    std::printf("%ld x %ld, %ld heads, K in %d segments: %ld values compared\n", form.n, form.k,
                form.heads, Segments(form), compared);
  }
}

// Rows, some with numbers of all kinds, and all of them once more: turned ones are a part.
std::vector<Bf16> RowsTwice(int64_t count, int64_t stride, uint64_t seed) {
  Prng random(seed);
  const std::vector<Bf16> block = RandomBf16(random, 1'000'003);
  std::vector<Bf16> rows(static_cast<size_t>(count * stride));
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = block[i % block.size()];
  for (size_t row = 0; row < static_cast<size_t>(count); row += 64) {
    const auto width = static_cast<size_t>(stride);
    rows[row * width + 5] = Bf16{0x7fc0};         // NaN
    rows[(row + 9) * width] = Bf16{0xff80};       // -infinity
    rows[(row + 30) * width + 6] = Bf16{0x7f7f};  // the largest number
  }
  rows.resize(2 * rows.size());
  std::copy_n(rows.begin(), rows.size() / 2, rows.begin() + static_cast<int64_t>(rows.size() / 2));
  return rows;
}

// One call of all rows against calls of a few, the rows at other places (turned by some rows).
TEST_F(Bf16LinearTest, ChunksOfACallGiveTheBitsOfTheWhole) {
  constexpr int64_t kRows = 2048;
  for (const Form& form : {Form{.n = 256, .k = 7168, .f32 = true}, QueryAbsorb(16),
                           OutputAbsorb(16), Form{.n = 7168, .k = 1024}}) {
    const Product product(form, 10);
    const DeviceBuffer<Bf16> x(RowsTwice(kRows, form.XStride(), 11));
    const int64_t row_bytes = form.OutStride() * (form.f32 ? 4 : 2);
    DeviceBuffer<uint8_t> out(static_cast<size_t>(kRows * row_bytes));
    std::vector<uint8_t> found(out.count());
    const auto multiply = [&](int64_t first, int64_t chunk) {
      out.Poison();
      for (int64_t row = 0; row < kRows; row += chunk) {
        const Bf16* const rows = x.get() + (first + row) * form.XStride();
        ASSERT_STATUS_OK(LaunchBf16Linear(
            product.Params(std::min(chunk, kRows - row), rows, out.get() + row * row_bytes),
            nullptr));
      }
      ASSERT_CUDA_OK(cudaMemcpy(found.data(), out.get(), found.size(), cudaMemcpyDeviceToHost));
    };
    multiply(0, kRows);
    const uint64_t whole = HashOf(found);
    const CompetingKernel competing;
    Prng places(12);
    int64_t compared = 0;
    for (int turn = 0; compared < 100'000'000; ++turn) {
      const int64_t turned = turn == 0 ? 0 : 1 + static_cast<int64_t>(places.Below(kRows - 1));
      for (const int64_t chunk : {1, 16, 63, 512}) {
        if (chunk == 1 && turn > 2) continue;  // three placements; they take the longest
        multiply(turned, chunk);
        std::rotate(found.begin(), found.end() - turned * row_bytes, found.end());
        ASSERT_EQ(HashOf(found), whole)
            << form.n << " x " << form.k << ", calls of " << chunk << " rows, turned by " << turned;
        compared += kRows * form.n * form.heads;
      }
    }
    EXPECT_TRUE(competing.Runs());
    EXPECT_GE(compared, 100'000'000);
    std::printf("%ld x %ld, %ld heads, K in %d segments: %ld values compared\n", form.n, form.k,
                form.heads, Segments(form), compared);
  }
}

// The gate with K in two chains where a call has few rows: what the tests above would find.
TEST_F(Bf16LinearTest, ASplitThatFollowsTheBatchWouldBeSeen) {
  constexpr int64_t kRows = 64;
  const Product gate(Form{.n = 256, .k = 7168, .f32 = true}, 13);
  const int64_t half = gate.form().k / 2;
  const std::vector<Bf16> rows = gate.RandomRows(kRows, 14);
  const DeviceBuffer<Bf16> x(rows);
  const std::vector<uint32_t> whole = gate.Multiply(x, kRows);
  std::vector<std::vector<float>> parts;
  for (const int64_t first : {int64_t{0}, half}) {
    const DeviceBuffer<float> out(whole.size());
    Bf16LinearParams params = gate.Params(kRows, x.get() + first, out.get());
    params.k = half;
    params.weight += first;
    ASSERT_STATUS_OK(LaunchBf16Linear(params, nullptr));
    ASSERT_CUDA_OK(cudaStreamSynchronize(nullptr));
    parts.push_back(out.Download());
  }
  int64_t different = 0;
  for (size_t row = 0; row < kRows; ++row) {
    std::vector<uint32_t> split;
    for (size_t i = row * 256; i < row * 256 + 256; ++i)
      split.push_back(std::bit_cast<uint32_t>(parts[0][i] + parts[1][i]));
    different +=
        !std::equal(split.begin(), split.end(), whole.begin() + static_cast<int64_t>(row) * 256);
  }
  std::printf("%ld of %ld rows differ with K in two chains\n", different, kRows);
  EXPECT_EQ(different, kRows);
}

TEST_F(Bf16LinearTest, TheHeadOfTheModelIsOneChainForAnyChunks) {
  constexpr int64_t kN = 129'280, kK = 7168, kM = 512;
  ASSERT_EQ(Bf16LinearSegments(kN, kK), 1);
  ASSERT_EQ(Bf16LinearSegments(256, kK), 8);
  Prng random(7);
  const std::vector<Bf16> block = RandomBf16(random, 3'700'003, 0.02f);
  Bf16* weight = nullptr;  // no guards: checking 1.9 GB takes longer than the test
  ASSERT_CUDA_OK(
      cudaMallocAsync(reinterpret_cast<void**>(&weight), kN * kK * sizeof(Bf16), nullptr));
  for (int64_t at = 0; at < kN * kK; at += static_cast<int64_t>(block.size())) {
    const size_t count = std::min(block.size(), static_cast<size_t>(kN * kK - at));
    ASSERT_CUDA_OK(cudaMemcpy(weight + at, at == 0 ? block.data() : weight, count * sizeof(Bf16),
                              cudaMemcpyDefault));
  }
  const DeviceBuffer<Bf16> x(RandomBf16(random, kM * kK));
  DeviceBuffer<float> out(kM * kN);
  const CompetingKernel competing;
  std::vector<uint64_t> first;
  int64_t compared = 0;
  for (const int64_t chunk : {512, 63, 16, 1}) {
    const int64_t rows = chunk == 1 ? 40 : kM;
    out.Poison();
    for (int64_t row = 0; row < rows; row += chunk) {
      Bf16LinearParams params;
      params.m = std::min(chunk, rows - row);
      params.n = params.out_stride = kN;
      params.k = params.x_stride = params.weight_stride = kK;
      params.x = x.get() + row * kK;
      params.weight = weight;
      params.out_f32 = out.get() + row * kN;
      ASSERT_STATUS_OK(LaunchBf16Linear(params, nullptr));
    }
    std::vector<float> all(static_cast<size_t>(rows * kN));
    ASSERT_CUDA_OK(
        cudaMemcpy(all.data(), out.get(), all.size() * sizeof(float), cudaMemcpyDeviceToHost));
    for (int64_t row = 0; row < rows; ++row) {
      const uint64_t hash = Hash64(all.data() + row * kN, kN * sizeof(float));
      if (chunk == 512) {
        first.push_back(hash);
      } else {
        ASSERT_EQ(hash, first[static_cast<size_t>(row)])
            << "chunks of " << chunk << ", row " << row;
        compared += kN;
      }
    }
  }
  EXPECT_TRUE(competing.Runs());
  cudaFreeAsync(weight, nullptr);
  std::printf("%ld values compared\n", compared);
  EXPECT_GT(compared, 100'000'000);
}

TEST_F(Bf16LinearTest, LaunchesBesideACompetingKernelAgree) {
  // The gate, both absorptions, segments that are fetched, and the LM head's one chain.
  for (const Form& form :
       {Form{.n = 256, .k = 7168, .f32 = true}, QueryAbsorb(16), OutputAbsorb(16),
        Form{.n = 7168, .k = 1024}, Form{.n = 24'960, .k = 448, .f32 = true}}) {
    const Product product(form, 8);
    for (const int64_t m : {3, 64, 128}) {
      SCOPED_TRACE(absl::StrCat(form.n, " x ", form.k, ", m = ", m));
      const DeviceBuffer<Bf16> x(product.RandomRows(m, 9));
      const auto bytes = static_cast<size_t>(m * form.OutStride() * (form.f32 ? 4 : 2));
      const DeviceBuffer<uint8_t> out(bytes), other(bytes);
      ExpectEqualLaunches(
          {{{{out.get(), bytes}}, {{other.get(), bytes}}}}, [&](int set, cudaStream_t stream) {
            return LaunchBf16Linear(product.Params(m, x.get(), set == 0 ? out.get() : other.get()),
                                    stream);
          });
    }
  }
}

// The kernel in front lets the next one start at once and writes its rows late.
TEST_F(Bf16LinearTest, RowsOfTheKernelInFrontAreWaitedFor) {
  for (const Form& form : {Form{.n = 256, .k = 7168, .f32 = true}, QueryAbsorb(16),
                           OutputAbsorb(16), Form{.n = 7168, .k = 1024}}) {
    const Product product(form, 13);
    for (const int64_t m : {1, 64, 128}) {
      const DeviceBuffer<Bf16> x(product.RandomRows(m, 14)), next(product.RandomRows(m, 15));
      DeviceBuffer<uint8_t> out(static_cast<size_t>(m * form.OutStride() * (form.f32 ? 4 : 2)));
      ASSERT_STATUS_OK(LaunchBf16Linear(product.Params(m, next.get(), out.get()), nullptr));
      const uint64_t expected = HashOf(out.Download());
      out.Poison();
      ASSERT_CUDA_OK(cudaDeviceSynchronize());
      LaunchSlowCopy(x.get(), next.get(), x.count() * sizeof(Bf16), nullptr);
      ASSERT_STATUS_OK(LaunchBf16Linear(product.Params(m, x.get(), out.get()), nullptr));
      EXPECT_EQ(HashOf(out.Download()), expected) << form.n << " x " << form.k << ", m = " << m;
    }
  }
}

TEST_F(Bf16LinearTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  const DeviceBuffer<Bf16> memory(4096);
  Bf16LinearParams good;
  EXPECT_TRUE(LaunchBf16Linear(good, nullptr).ok()) << "no rows";
  good.m = 1;
  good.n = good.out_stride = 16;
  good.k = good.x_stride = good.weight_stride = 64;
  good.x = good.weight = memory.get();
  good.out_bf16 = memory.get() + 2048;
  ASSERT_STATUS_OK(LaunchBf16Linear(good, nullptr));
  const auto expect_refused = [&](const char* name, auto change) {
    Bf16LinearParams bad = good;
    change(bad);
    const absl::Status status = LaunchBf16Linear(bad, nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_NE(status.message().find(name), absl::string_view::npos) << status.ToString();
  };
  expect_refused("m is -1", [](Bf16LinearParams& p) { p.m = -1; });
  expect_refused("n is 0", [](Bf16LinearParams& p) { p.n = 0; });
  expect_refused("n is 12", [](Bf16LinearParams& p) { p.n = 12, p.weight_transposed = true; });
  expect_refused("k is 60", [](Bf16LinearParams& p) { p.k = 60; });
  expect_refused("k is 56", [](Bf16LinearParams& p) { p.k = 56, p.heads = 2; });
  expect_refused("heads is 0", [](Bf16LinearParams& p) { p.heads = 0; });
  expect_refused("x_stride is 56", [](Bf16LinearParams& p) { p.x_stride = 56; });
  expect_refused("x_head_stride is -1", [](Bf16LinearParams& p) { p.x_head_stride = -1; });
  expect_refused("weight_stride is 65", [](Bf16LinearParams& p) { p.weight_stride = 65; });
  expect_refused("weight_head_stride is 32",
                 [](Bf16LinearParams& p) { p.weight_head_stride = 32; });
  expect_refused("out_stride is 8", [](Bf16LinearParams& p) { p.out_stride = 8; });
  expect_refused("out_head_stride is -1", [](Bf16LinearParams& p) { p.out_head_stride = -1; });
  expect_refused("x is not aligned", [](Bf16LinearParams& p) { p.x += 1; });
  expect_refused("weight is null", [](Bf16LinearParams& p) { p.weight = nullptr; });
  expect_refused("out_f32 is not aligned", [](Bf16LinearParams& p) {
    p.out_f32 = reinterpret_cast<float*>(p.out_bf16 + 1), p.out_bf16 = nullptr;
  });
  expect_refused("out_bf16, out_f32", [](Bf16LinearParams& p) { p.out_bf16 = nullptr; });
}

// The kernel in front lets the next one start at once and reads late what that one overwrites.
TEST_F(Bf16LinearTest, OutputsAreLeftAloneUntilTheKernelInFrontHasReadThem) {
  // Resident segments, eight and one. As a stream: both absorptions, segments that are fetched, one
  // chain to outputs of both types.
  for (const Form& form : {Form{.n = 256, .k = 7168, .f32 = true}, Form{.n = 192, .k = 64},
                           QueryAbsorb(16), OutputAbsorb(16), Form{.n = 7168, .k = 1024},
                           Form{.n = 16'448, .k = 128, .f32 = true}, Form{.n = 16'450, .k = 72}}) {
    const Product product(form, 16);
    for (const int64_t m : {1, 64, 128}) {
      const DeviceBuffer<Bf16> x(product.RandomRows(m, 17));
      DeviceBuffer<uint8_t> out(static_cast<size_t>(m * form.OutStride() * (form.f32 ? 4 : 2)));
      const Bf16LinearParams params = product.Params(m, x.get(), out.get());
      ASSERT_STATUS_OK(LaunchBf16Linear(params, nullptr));  // a first launch may wait for others
      const uint64_t expected = HashOf(out.Download());
      const LateReader reader(out.get(), out.count());
      ASSERT_STATUS_OK(LaunchBf16Linear(params, nullptr));
      EXPECT_TRUE(reader.FoundTheFilling()) << form.n << " x " << form.k << ", m = " << m;
      EXPECT_EQ(HashOf(out.Download()), expected) << form.n << " x " << form.k << ", m = " << m;
    }
  }
}

}  // namespace
}  // namespace moebius::kernels::cuda
