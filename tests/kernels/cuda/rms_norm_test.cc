#include "kernels/cuda/rms_norm/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/reference/dense.h"
#include "kernels/reference/experts.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/row_rule.h"

namespace moebius::kernels::cuda {
namespace {

constexpr reference::Rounding kServing = reference::Rounding::kServing;

enum class Addition { kNone, kResidual, kMoeResidual };

struct Case {
  int64_t m, dim, padding;
  Addition addition;
  bool power_of_two;
};

std::vector<float> Floats(const std::vector<Bf16>& values, int64_t begin, int64_t count) {
  std::vector<float> floats;
  for (int64_t i = 0; i < count; ++i)
    floats.push_back(ToFloat(values[static_cast<size_t>(begin + i)]));
  return floats;
}

// A batch of pool rows on the device, normalised in every way a layer may ask for.
class Batch {
 public:
  Batch(const Case& c, const RowPool& x, const RowPool& add, const RowPool& shared, int64_t shift,
        const std::vector<float>& weight)
      : c_(c),
        stride_(c.dim + c.padding),
        x_host_(x.Batch(c.m, shift, stride_)),
        add_host_(add.Batch(c.m, shift)),
        shared_host_(shared.Batch(c.m, shift)),
        x_(x_host_),
        add_(add_host_),
        shared_(shared_host_),
        sum_(static_cast<size_t>(c.m * c.dim)),
        weight_(weight),
        out_(static_cast<size_t>(c.m * stride_)),
        codes_(static_cast<size_t>(c.m * c.dim)),
        scales_(static_cast<size_t>(c.m * CeilDiv(c.dim, 128))) {
    params.m = c.m;
    params.dim = c.dim;
    params.x = x_.get();
    params.x_stride = stride_;
    if (c.addition != Addition::kNone) {
      params.add = add_.get();
      params.sum = sum_.get();
    }
    if (c.addition == Addition::kMoeResidual) params.add_shared = shared_.get();
    params.weight = weight_.get();
    params.out = out_.get();
    params.out_stride = stride_;
    params.codes = codes_.get();
    params.scales = scales_.get();
    params.power_of_two_scales = c.power_of_two;
  }

  void Run() {
    const absl::Status status = LaunchRmsNorm(params, nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "RmsNorm");
  }

  std::vector<uint64_t> Hashes() const {
    RowHashes hashes(c_.m);
    if (c_.addition != Addition::kNone) hashes.Add(sum_.Download(), c_.dim, c_.dim);
    if (params.out != nullptr) hashes.Add(out_.Download(), c_.dim, stride_);
    if (params.codes != nullptr) {
      hashes.Add(codes_.Download(), c_.dim, c_.dim);
      hashes.Add(scales_.Download(), CeilDiv(c_.dim, 128), CeilDiv(c_.dim, 128));
    }
    return hashes.hashes();
  }

  // Compares everything with kernels/reference; the norm itself may differ by the order of its sum.
  void ExpectReference(const std::vector<float>& weight, UlpReport& norms) const {
    const std::vector<Bf16> sum = sum_.Download(), out = out_.Download();
    const std::vector<E4m3> codes = codes_.Download();
    const std::vector<float> scales = scales_.Download();
    const int64_t blocks = CeilDiv(c_.dim, 128);
    for (int64_t row = 0; row < c_.m; ++row) {
      std::vector<float> x = Floats(x_host_, row * stride_, c_.dim);
      if (c_.addition != Addition::kNone) {
        std::vector<float> y = Floats(add_host_, row * c_.dim, c_.dim);
        if (c_.addition == Addition::kMoeResidual) {
          reference::ResidualAddRow(Floats(shared_host_, row * c_.dim, c_.dim), kServing,
                                    absl::MakeSpan(y));
        }
        reference::ResidualAddRow(y, kServing, absl::MakeSpan(x));
        for (int64_t i = 0; i < c_.dim; ++i) {
          const Bf16 found = sum[static_cast<size_t>(row * c_.dim + i)];
          ASSERT_EQ(UlpDistance(found, ToBf16(x[static_cast<size_t>(i)])), 0)
              << "sum of row " << row << ", element " << i;
        }
      }
      reference::RmsNormRow(x, weight, 1e-6f, kServing, absl::MakeSpan(x));
      for (int64_t i = 0; i < c_.dim; ++i) {
        norms.Add(out[static_cast<size_t>(row * stride_ + i)], ToBf16(x[static_cast<size_t>(i)]));
      }
      std::vector<E4m3> expected(static_cast<size_t>(c_.dim));
      std::vector<float> expected_scales(static_cast<size_t>(blocks));
      reference::QuantizeRow(Floats(out, row * stride_, c_.dim), c_.power_of_two,
                             absl::MakeSpan(expected), absl::MakeSpan(expected_scales));
      for (int64_t i = 0; i < c_.dim; ++i) {
        ASSERT_EQ(codes[static_cast<size_t>(row * c_.dim + i)].bits,
                  expected[static_cast<size_t>(i)].bits)
            << "code of row " << row << ", element " << i;
      }
      for (int64_t b = 0; b < blocks; ++b) {
        ASSERT_EQ(std::bit_cast<uint32_t>(scales[static_cast<size_t>(row * blocks + b)]),
                  std::bit_cast<uint32_t>(expected_scales[static_cast<size_t>(b)]))
            << "scale of row " << row << ", block " << b;
      }
    }
  }

  RmsNormParams params;

 private:
  const Case c_;
  const int64_t stride_;
  const std::vector<Bf16> x_host_, add_host_, shared_host_;
  DeviceBuffer<Bf16> x_, add_, shared_, sum_;
  DeviceBuffer<float> weight_;
  DeviceBuffer<Bf16> out_;
  DeviceBuffer<E4m3> codes_;
  DeviceBuffer<float> scales_;
};

std::vector<float> RandomWeight(int64_t dim) {
  Prng random(9);
  return RandomFloats(random, static_cast<size_t>(dim));
}

class RmsNormTest : public GpuTest {};

TEST_F(RmsNormTest, AgreesWithTheReferenceAtOddShapes) {
  UlpReport norms;
  for (const Case c :
       {Case{1, 7168, 0, Addition::kMoeResidual, false}, Case{16, 1, 0, Addition::kNone, false},
        Case{17, 16, 8, Addition::kResidual, true}, Case{16, 27, 5, Addition::kMoeResidual, false},
        Case{33, 512, 64, Addition::kNone, true}, Case{128, 1536, 576, Addition::kNone, false},
        Case{16, 1027, 1, Addition::kResidual, true}, Case{65, 1040, 0, Addition::kNone, false},
        Case{1000, 272, 0, Addition::kMoeResidual, true},
        Case{300, 136, 0, Addition::kResidual, false},
        Case{3, 8192, 0, Addition::kMoeResidual, false},
        Case{16, 16384, 0, Addition::kResidual, false},
        Case{16, 16383, 0, Addition::kMoeResidual, true}}) {
    const RowPool x(c.dim, 1), add(c.dim, 2), shared(c.dim, 3);
    const std::vector<float> weight = RandomWeight(c.dim);
    Batch batch(c, x, add, shared, 5, weight);
    batch.Run();
    batch.ExpectReference(weight, norms);
  }
  norms.Print("RMSNorm against the reference");
  EXPECT_LE(norms.worst, 1);
}

TEST_F(RmsNormTest, NoFusionChangesTheBits) {
  const Case c{37, 1040, 0, Addition::kNone, false};
  const RowPool x(c.dim, 4), add(c.dim, 5), shared(c.dim, 6);
  const std::vector<float> weight = RandomWeight(c.dim);
  Batch both(c, x, add, shared, 0, weight), out(c, x, add, shared, 0, weight),
      codes(c, x, add, shared, 0, weight);
  const std::vector<uint64_t> poisoned = both.Hashes();
  both.Run();
  out.params.codes = nullptr;
  out.Run();
  codes.params.out = nullptr;
  codes.Run();
  both.params.codes = nullptr;
  EXPECT_EQ(both.Hashes(), out.Hashes());
  both.params.codes = codes.params.codes;
  both.params.out = nullptr;
  EXPECT_EQ(both.Hashes(), codes.Hashes());
  EXPECT_NE(both.Hashes(), poisoned);
}

TEST_F(RmsNormTest, SumAndOutMayLieWhereTheRowsDid) {
  const int64_t m = 19, dim = 1040;
  const RowPool x(dim, 4), add(dim, 5);
  const std::vector<float> weight = RandomWeight(dim);
  const DeviceBuffer<float> device_weight(weight);
  const DeviceBuffer<Bf16> y(add.Batch(m, 0)), apart(x.Batch(m, 0)), together(x.Batch(m, 0)),
      out(static_cast<size_t>(m * dim)), sum(static_cast<size_t>(m * dim));
  RmsNormParams params;
  params.m = m;
  params.dim = params.x_stride = params.out_stride = dim;
  params.weight = device_weight.get();
  params.add = y.get();
  params.x = apart.get();
  params.sum = sum.get();
  params.out = out.get();
  ASSERT_STATUS_OK(LaunchRmsNorm(params, nullptr));
  params.x = params.sum = together.get();
  params.out = y.get();
  ASSERT_STATUS_OK(LaunchRmsNorm(params, nullptr));
  EXPECT_EQ(HashOf(together.Download()), HashOf(sum.Download()));
  EXPECT_EQ(HashOf(y.Download()), HashOf(out.Download()));
}

TEST_F(RmsNormTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  for (const int64_t dim : {1040, 777}) {
    for (const Addition addition : {Addition::kNone, Addition::kMoeResidual}) {
      const RowPool x(dim, 7), add(dim, 8), shared(dim, 9);
      const std::vector<float> weight = RandomWeight(dim);
      ExpectRowRule("RMSNorm", dim, [&](int64_t m, int64_t shift) {
        Batch batch({m, dim, 8, addition, false}, x, add, shared, shift, weight);
        batch.Run();
        return batch.Hashes();
      });
    }
  }
}

TEST_F(RmsNormTest, ARowHasTheSameBitsAtTheWidthOfDeepSeekV3Too) {
  const int64_t dim = 7168;
  const RowPool x(dim, 10), add(dim, 11), shared(dim, 12);
  const std::vector<float> weight = RandomWeight(dim);
  for (const Addition addition : {Addition::kNone, Addition::kResidual}) {
    ExpectRowRule(
        "RMSNorm", dim,
        [&](int64_t m, int64_t shift) {
          Batch batch({m, dim, 0, addition, true}, x, add, shared, shift, weight);
          batch.Run();
          return batch.Hashes();
        },
        512);
  }
}

TEST_F(RmsNormTest, AnOrderThatDependsOnTheBatchWouldBeSeen) {
  // One row with its elements moved round by 8 * m: the same numbers, added in an order that
  // depends on m. The sum of this row then differs by a unit in the last place (of most rows it
  // does not), and the weights put every output on a tie between two BF16 values, where that shows.
  const int64_t dim = 7168;
  Prng random(5);
  std::vector<Bf16> row;
  double squares = 0;
  for (int64_t i = 0; i < dim; ++i) {
    row.push_back(ToBf16(4.0f * (random.Unit() - 0.5f)));
    squares += static_cast<double>(ToFloat(row.back())) * ToFloat(row.back());
  }
  const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(dim) + 1e-6);
  std::vector<float> weight;
  for (int64_t i = 0; i < dim; ++i) {
    const double tie = 1.0 + static_cast<double>(2 * (i % 64) + 1) / 256.0;
    const float x = ToFloat(row[static_cast<size_t>(i)]);
    weight.push_back(x == 0.0f ? 1.0f : static_cast<float>(tie / (x * inverse)));
  }
  const auto run = [&](int64_t m, int64_t) {
    const int64_t by = m == 1 ? 0 : 8 * m % dim;
    std::vector<Bf16> moved = row, rows;
    std::vector<float> moved_weight = weight;
    std::rotate(moved.begin(), moved.begin() + by, moved.end());
    std::rotate(moved_weight.begin(), moved_weight.begin() + by, moved_weight.end());
    for (int64_t i = 0; i < m; ++i) rows.insert(rows.end(), moved.begin(), moved.end());
    const DeviceBuffer<Bf16> in(rows), out(rows.size());
    const DeviceBuffer<float> device_weight(moved_weight);
    RmsNormParams params;
    params.m = m;
    params.dim = params.x_stride = params.out_stride = dim;
    params.x = in.get();
    params.weight = device_weight.get();
    params.out = out.get();
    EXPECT_TRUE(LaunchRmsNorm(params, nullptr).ok());
    std::vector<Bf16> found = out.Download();
    for (int64_t i = 0; i < m; ++i) {
      std::rotate(found.begin() + i * dim, found.begin() + (i + 1) * dim - by,
                  found.begin() + (i + 1) * dim);
    }
    RowHashes hashes(m);
    hashes.Add(found, dim, dim);
    return hashes.hashes();
  };
  int64_t rows = 0;
  const std::string breach = FindRowRuleBreach(run, 129, &rows);
  std::printf("seen at %s\n", breach.c_str());
  EXPECT_NE(breach, "");
}

TEST_F(RmsNormTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  RmsNormParams params;
  EXPECT_TRUE(LaunchRmsNorm(params, nullptr).ok()) << "no rows";
  const auto refusal = [&] { return std::string(LaunchRmsNorm(params, nullptr).message()); };
  const DeviceBuffer<Bf16> rows(64);
  const DeviceBuffer<float> weight(64);
  params.m = 1;
  EXPECT_NE(refusal().find("dim is 0"), std::string::npos);
  params.dim = kRmsNormMaxDim + 1;
  EXPECT_NE(refusal().find("dim is 16385"), std::string::npos);
  params.dim = 32;
  params.x_stride = 31;
  EXPECT_NE(refusal().find("x_stride is 31"), std::string::npos);
  params.x_stride = 32;
  EXPECT_NE(refusal().find("x is null"), std::string::npos);
  params.x = rows.get();
  EXPECT_NE(refusal().find("weight is null"), std::string::npos);
  params.weight = weight.get();
  EXPECT_NE(refusal().find("neither out nor codes"), std::string::npos);
  params.out = rows.get();
  EXPECT_NE(refusal().find("out_stride is 0"), std::string::npos);
  params.out_stride = 32;
  params.add = rows.get();
  EXPECT_NE(refusal().find("sum is null"), std::string::npos);
  params.add = nullptr;
  params.add_shared = rows.get();
  EXPECT_NE(refusal().find("add is null"), std::string::npos);
  params.add_shared = nullptr;
  params.codes = reinterpret_cast<E4m3*>(rows.get());
  EXPECT_NE(refusal().find("scales is null"), std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
