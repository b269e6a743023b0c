// Goal: the grouped expert FFN agrees with kernels/reference for any counts of rows and shapes, and
// a row's bits depend on nothing but the row and its expert. Method: random experts small enough
// for the reference row by row, one at DeepSeek-V3's size; batches that repeat one row at many
// places among neighbours of every kind.

#include "kernels/cuda/expert_ffn/expert_ffn.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>

#include "base/status_macros.h"
#include "kernels/cuda/residual/residual.h"
#include "kernels/reference/experts.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/launch_comparison.h"
#include "tests/kernels/cuda/silu_of_all.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {
namespace {

// Codes of all signs and mantissas, exponents as in a trained matrix: eight from a draw, because
// weights here are many.
std::vector<E4m3> RandomCodes(Prng& random, int64_t count) {
  std::vector<E4m3> codes(static_cast<size_t>(count));
  uint64_t bits = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    if (i % 4 == 0) bits = random.Next();
    const uint64_t draw = bits >> (16 * (i % 4));
    codes[i] = E4m3{static_cast<uint8_t>((draw & 0x87) | ((4 + (draw >> 8) % 8) << 3))};
  }
  return codes;
}

std::vector<float> RandomScales(Prng& random, int64_t count, float scale) {
  std::vector<float> scales(static_cast<size_t>(count));
  for (float& s : scales) s = scale * (0.5f + random.Unit());
  return scales;
}

struct Matrix {
  Matrix(Prng& random, int64_t rows, int64_t cols)
      : n(rows),
        k(cols),
        codes(RandomCodes(random, rows * cols)),
        scales(RandomScales(random, CeilDiv(rows, 128) * CeilDiv(cols, 128), 0.02f)),
        device_codes(codes),
        device_scales(scales) {}
  MatrixView View() const {
    return {DType::kE4m3, n, k, reinterpret_cast<const std::byte*>(codes.data()), scales.data()};
  }
  int64_t n, k;
  std::vector<E4m3> codes;
  std::vector<float> scales;
  DeviceBuffer<E4m3> device_codes;
  DeviceBuffer<float> device_scales;
};

struct Expert {
  Expert(Prng& random, int64_t hidden, int64_t intermediate)
      : gate(random, intermediate, hidden),
        up(random, intermediate, hidden),
        down(random, hidden, intermediate) {}
  ExpertMatrices Device() const {
    return {gate.device_codes.get(),  up.device_codes.get(),  down.device_codes.get(),
            gate.device_scales.get(), up.device_scales.get(), down.device_scales.get()};
  }
  Matrix gate, up, down;
};

struct Experts {
  Experts(int64_t count, int64_t hidden_size, int64_t intermediate_size, uint64_t seed)
      : hidden(hidden_size), intermediate(intermediate_size) {
    Prng random(seed);
    std::vector<ExpertMatrices> devices;
    for (int64_t e = 0; e < count; ++e) {
      all.push_back(std::make_unique<Expert>(random, hidden, intermediate));
      devices.push_back(all.back()->Device());
    }
    auto created = ExpertTable::Create(hidden, intermediate, devices);
    EXPECT_TRUE(created.ok()) << created.status().ToString();
    if (created.ok()) table = std::make_unique<ExpertTable>(*std::move(created));
  }
  int64_t hidden, intermediate;
  std::vector<std::unique_ptr<Expert>> all;
  std::unique_ptr<ExpertTable> table;
};

struct Sources {
  Sources(int64_t rows, int64_t hidden, uint64_t seed) : k(hidden), blocks(CeilDiv(hidden, 128)) {
    Prng random(seed);
    codes = RandomCodes(random, rows * hidden);
    scales = RandomScales(random, rows * blocks, 0.03f);
  }
  absl::Span<const E4m3> Codes(int64_t row) const {
    return absl::MakeConstSpan(codes).subspan(static_cast<size_t>(row * k), static_cast<size_t>(k));
  }
  absl::Span<const float> Scales(int64_t row) const {
    return absl::MakeConstSpan(scales).subspan(static_cast<size_t>(row * blocks),
                                               static_cast<size_t>(blocks));
  }
  int64_t k, blocks;
  std::vector<E4m3> codes;
  std::vector<float> scales;
};

std::vector<int32_t> Offsets(const std::vector<int64_t>& counts) {
  std::vector<int32_t> offsets = {0};
  for (const int64_t count : counts)
    offsets.push_back(offsets.back() + static_cast<int32_t>(count));
  return offsets;
}

ExpertWorkspace WorkspaceFor(const Experts& experts, int64_t rows) {
  auto workspace = ExpertWorkspace::Create(rows, experts.hidden, experts.intermediate, 512);
  EXPECT_TRUE(workspace.ok()) << workspace.status().ToString();
  return *std::move(workspace);
}

// The parameters of a call but its output, and the device memory that they name. Beside a
// competing kernel it needs a workspace made before: to free one waits for every running kernel.
struct Call {
  // `capacity`: rows of output.
  Call(const Experts& experts, const Sources& sources, const std::vector<int64_t>& counts,
       const std::vector<int32_t>& row_index, int64_t capacity, const ExpertWorkspace& workspace)
      : codes(sources.codes),
        scales(sources.scales),
        offsets(Offsets(counts)),
        index(row_index),
        out_size(static_cast<size_t>(capacity * experts.hidden)) {
    params.table = experts.table.get();
    params.num_experts = static_cast<int64_t>(counts.size());
    params.row_offsets = offsets.get();
    params.rows_max = capacity;
    params.x_codes = codes.get();
    params.x_scales = scales.get();
    params.row_index = row_index.empty() ? nullptr : index.get();
    params.workspace = &workspace;
  }

  DeviceBuffer<E4m3> codes;
  DeviceBuffer<float> scales;
  DeviceBuffer<int32_t> offsets, index;
  size_t out_size;  // elements
  GroupedFfnParams params;
};

std::vector<Bf16> RunFfn(const Experts& experts, const Sources& sources,
                         const std::vector<int64_t>& counts, const std::vector<int32_t>& row_index,
                         int64_t capacity, const ExpertWorkspace& workspace,
                         bool power_of_two_scales = false) {
  Call call(experts, sources, counts, row_index, capacity, workspace);
  const DeviceBuffer<Bf16> out(call.out_size);
  call.params.power_of_two_scales = power_of_two_scales;
  call.params.out = out.get();
  const absl::Status status = LaunchExpertFfn(call.params, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "ExpertFfn");
  return out.Download();
}

std::vector<float> Expected(const Expert& expert, const Sources& sources, int64_t source,
                            bool power_of_two_scales) {
  std::vector<float> out(static_cast<size_t>(expert.down.n));
  reference::ExpertFfnQuantizedRow({expert.gate.View(), expert.up.View(), expert.down.View()},
                                   sources.Codes(source), sources.Scales(source),
                                   power_of_two_scales, reference::Rounding::kServing,
                                   absl::MakeSpan(out));
  return out;
}

std::vector<int32_t> RandomIndex(int64_t rows, int64_t sources, uint64_t seed) {
  Prng random(seed);
  std::vector<int32_t> index(static_cast<size_t>(rows));
  for (int32_t& i : index) i = static_cast<int32_t>(random.Below(static_cast<uint64_t>(sources)));
  return index;
}

class ExpertFfnTest : public GpuTest {};

TEST_F(ExpertFfnTest, AgreesWithTheReferenceForAnyCountsAndShapes) {
  struct Case {
    int64_t hidden, intermediate;
    std::vector<int64_t> counts;
    bool power_of_two_scales;
  };
  for (const Case& c : {
           Case{256, 128, {1}, false},
           Case{256, 256, {3, 0, 8, 17, 1, 0}, false},
           Case{400, 272, {9, 33, 0, 64}, false},
           Case{1040, 144, {65, 2, 130}, true},
           Case{16, 16, {1, 0, 5}, false},
           Case{48, 32, {81, 128, 80, 1, 113}, false},
           Case{2304, 320, {0, 257}, true},
           Case{1168, 528, {0, 0, 300, 0}, false},
           Case{7168, 2048, {1, 2}, false},
           Case{7168, 2048, {0, 3}, true},
       }) {
    const Experts experts(static_cast<int64_t>(c.counts.size()), c.hidden, c.intermediate, 1);
    const int64_t rows = std::accumulate(c.counts.begin(), c.counts.end(), int64_t{0});
    const Sources sources(rows + 3, c.hidden, 2);
    const std::vector<int32_t> index = RandomIndex(rows, rows + 3, 3);
    const std::vector<Bf16> out = RunFfn(experts, sources, c.counts, index, rows + 7,
                                         WorkspaceFor(experts, rows + 7), c.power_of_two_scales);
    const std::vector<int32_t> offsets = Offsets(c.counts);
    std::vector<float> found, expected;
    for (size_t e = 0; e < c.counts.size(); ++e) {
      for (int64_t row = offsets[e]; row < offsets[e + 1]; ++row) {
        // Long experts: the first rows, the last ones and those at borders of tiles.
        const int64_t within = (row - offsets[e]) % 64;
        if (c.counts[e] > 40 && within > 2 && within < 62 && row + 2 < offsets[e + 1]) continue;
        const std::vector<float> one = Expected(
            *experts.all[e], sources, index[static_cast<size_t>(row)], c.power_of_two_scales);
        expected.insert(expected.end(), one.begin(), one.end());
        for (int64_t i = 0; i < c.hidden; ++i)
          found.push_back(ToFloat(out[static_cast<size_t>(row * c.hidden + i)]));
      }
    }
    const double difference = RelativeDifference(found, expected);
    const double worst = WorstElement(found, expected);
    std::printf("%ld x %ld, %ld rows of %zu experts: difference %.2g, worst element %.2g\n",
                c.hidden, c.intermediate, rows, c.counts.size(), difference, worst);
    // Asked for are 1e-3. Where a code of the requantised row falls to the other side an element
    // moves by a part of that code's weight; a wrong one would move by about 1.
    EXPECT_LT(difference, 1e-4) << c.hidden << " x " << c.intermediate;
    EXPECT_LT(worst, 0.1) << c.hidden << " x " << c.intermediate;
    for (int64_t i = rows * c.hidden; i < (rows + 7) * c.hidden; ++i)
      ASSERT_EQ(out[static_cast<size_t>(i)].bits, 0xcdcd) << "a row of nobody was written";
  }
}

TEST_F(ExpertFfnTest, SiluHasTheSameBitsOnItsShortAndItsLongWay) {
  const SiluDifferences silu = CompareSiluOfAllGates();
  EXPECT_EQ(silu.compared, (uint64_t{1} << 32) + 7 * (uint64_t{1} << 26));
  EXPECT_EQ(silu.different, 0) << "for example of " << silu.example;
}

TEST_F(ExpertFfnTest, RowsReadThemselvesWithoutAnIndex) {
  const Experts experts(2, 384, 256, 4);
  const Sources sources(50, 384, 5);
  std::vector<int32_t> identity(50);
  std::iota(identity.begin(), identity.end(), 0);
  const ExpertWorkspace workspace = WorkspaceFor(experts, 50);
  EXPECT_EQ(HashOf(RunFfn(experts, sources, {20, 30}, {}, 50, workspace)),
            HashOf(RunFfn(experts, sources, {20, 30}, identity, 50, workspace)));
}

// Sources: row 0 is the one that is watched, the others are what may stand beside it.
Sources WithHostileNeighbours(int64_t rows, int64_t hidden, uint64_t seed) {
  Sources sources(rows, hidden, seed);
  for (int64_t row = 1; row < rows; ++row) {
    E4m3* const codes = sources.codes.data() + row * hidden;
    float* const scales = sources.scales.data() + row * sources.blocks;
    if (row % 6 == 1) codes[row % hidden] = E4m3{0x7f};
    if (row % 6 == 2) scales[row % sources.blocks] = INFINITY;
    if (row % 6 == 3) scales[row % sources.blocks] = NAN;
    if (row % 6 == 4) std::fill(codes, codes + hidden, E4m3{0x7e});
    if (row % 6 == 5) std::fill(scales, scales + sources.blocks, 1e30f);
  }
  return sources;
}

// How many of `counts`' rows of expert `watched` hold source 0, each compared with `alone`.
int64_t CompareWithAlone(const std::vector<Bf16>& out, const std::vector<int32_t>& index,
                         int64_t begin, int64_t end, int64_t hidden,
                         const std::vector<Bf16>& alone) {
  int64_t compared = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (index[static_cast<size_t>(row)] != 0) continue;
    if (std::memcmp(out.data() + row * hidden, alone.data(), static_cast<size_t>(hidden) * 2) !=
        0) {
      ADD_FAILURE() << "packed row " << row << " of expert rows " << begin << " .. " << end
                    << " has other bits than alone";
      return compared;
    }
    compared += hidden;
  }
  return compared;
}

TEST_F(ExpertFfnTest, ARowHasTheSameBitsAtEveryPlaceAmongAnyNeighbours) {
  int64_t compared = 0;
  for (const auto& [hidden, intermediate] :
       {std::pair<int64_t, int64_t>{7168, 2048}, {1168, 400}}) {
    const Experts experts(3, hidden, intermediate, 6);
    const Sources sources = WithHostileNeighbours(64, hidden, 7);
    const ExpertWorkspace workspace = WorkspaceFor(experts, 4300);
    const std::vector<Bf16> alone = RunFfn(experts, sources, {0, 1, 0}, {0}, 1, workspace);
    for (const Bf16 value : alone) ASSERT_TRUE(std::isfinite(ToFloat(value)));
    const CompetingKernel competing;
    for (const int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 80, 81, 112, 127, 128, 129, 512, 4096}) {
      for (int64_t placement = 0; placement < 6; ++placement) {
        // Other experts' rows before and after, so that tiles begin anywhere.
        const std::vector<int64_t> counts = {placement * 5, m, 3};
        const int64_t rows = counts[0] + counts[1] + counts[2];
        std::vector<int32_t> index = RandomIndex(rows, 64, 8 + static_cast<uint64_t>(m));
        for (int64_t row = placement; row < m; row += m < 64 ? 1 + placement : 2)
          index[static_cast<size_t>(counts[0] + row)] = 0;
        compared += CompareWithAlone(RunFfn(experts, sources, counts, index, rows, workspace),
                                     index, counts[0], counts[0] + m, hidden, alone);
      }
    }
    EXPECT_TRUE(competing.Runs());
  }
  std::printf("%ld values compared\n", compared);
  EXPECT_GT(compared, 100'000'000);
}

// A batch of rows, some of them hostile, in calls of a few against one call of all.
class Whole {
 public:
  Whole()
      : experts_(1, 7168, 2048, 9),
        workspace_(WorkspaceFor(experts_, kRows)),
        call_(experts_, WithHostileNeighbours(kRows, kHidden, 10), {kRows},
              RandomIndex(kRows, kRows, 11), kRows, workspace_),
        out_(call_.out_size),
        count_(std::vector<int32_t>{0, 0}) {
    // Every row once, and all of them once more: turned ones are a part.
    std::vector<int32_t> index(2 * kRows);
    for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int32_t>(i % kRows);
    index_ = std::make_unique<DeviceBuffer<int32_t>>(index);
    expected_ = Run(0, kRows, LaunchIt);
  }

  using Launcher = std::function<absl::Status(const GroupedFfnParams&)>;
  static absl::Status LaunchIt(const GroupedFfnParams& params) {
    return LaunchExpertFfn(params, nullptr);
  }

  // Rows that differ, of kRows.
  int64_t Different(int64_t chunk, int64_t shift, const Launcher& launch = LaunchIt) {
    const std::vector<Bf16> found = Run(shift, chunk, launch);
    int64_t different = 0;
    for (int64_t row = 0; row < kRows; ++row) {
      different += std::memcmp(&found[static_cast<size_t>(row * kHidden)],
                               &expected_[static_cast<size_t>((row + shift) % kRows * kHidden)],
                               kHidden * sizeof(Bf16)) != 0;
    }
    return different;
  }

  static constexpr int64_t kRows = 630, kHidden = 7168;
  const Experts& experts() const { return experts_; }

 private:
  std::vector<Bf16> Run(int64_t first, int64_t chunk, const Launcher& launch) {
    out_.Poison();
    GroupedFfnParams params = call_.params;
    params.row_offsets = count_.get();
    for (int64_t row = 0; row < kRows; row += chunk) {
      params.rows_max = std::min(chunk, kRows - row);
      if (row == 0 || params.rows_max != chunk)
        count_.Upload({0, static_cast<int32_t>(params.rows_max)});
      params.row_index = index_->get() + first + row;
      params.out = out_.get() + row * kHidden;
      const absl::Status status = launch(params);
      EXPECT_TRUE(status.ok()) << status.ToString();
    }
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "ExpertFfn");
    return out_.Download();
  }

  Experts experts_;
  ExpertWorkspace workspace_;
  Call call_;
  DeviceBuffer<Bf16> out_;
  DeviceBuffer<int32_t> count_;
  std::unique_ptr<DeviceBuffer<int32_t>> index_;
  std::vector<Bf16> expected_;
};

TEST_F(ExpertFfnTest, ChunksOfABatchAgree) {
  Whole whole;
  int64_t compared = 0;
  for (const int64_t chunk : {1, 16, 63, 80, 81, 512}) {
    for (const int64_t shift : {0, 1, 233}) {
      const CompetingKernel competing;
      EXPECT_EQ(whole.Different(chunk, shift), 0)
          << "calls of " << chunk << " rows, " << shift << " places on";
      EXPECT_TRUE(competing.Runs());
      compared += Whole::kRows * Whole::kHidden;
    }
  }
  // As many again in the sizes of decoding.
  for (const int64_t chunk : {2, 7, 8, 9, 32, 64, 65, 128}) {
    EXPECT_EQ(whole.Different(chunk, 5), 0) << "calls of " << chunk << " rows";
    compared += Whole::kRows * Whole::kHidden;
  }
  std::printf("%ld values compared\n", compared);
  EXPECT_GE(compared, 100'000'000);
}

// Calls of few rows whose second product has K in two parts, each of an expert that has zeros for
// the other half of its width: what the test above would find.
TEST_F(ExpertFfnTest, ASplitThatFollowsTheBatchWouldBeSeen) {
  Whole whole;
  const Expert& expert = *whole.experts().all[0];
  std::vector<ExpertTable> halves;
  std::vector<std::unique_ptr<DeviceBuffer<float>>> up_scales;
  for (const size_t half : {0u, 1u}) {
    std::vector<float> scales = expert.up.scales;
    std::fill_n(scales.begin() + static_cast<int64_t>(half * scales.size() / 2), scales.size() / 2,
                0.0f);
    up_scales.push_back(std::make_unique<DeviceBuffer<float>>(scales));
    ExpertMatrices matrices = expert.Device();
    matrices.up_scales = up_scales.back()->get();
    auto table = ExpertTable::Create(Whole::kHidden, expert.up.n, {matrices});
    ASSERT_STATUS_OK(table.status());
    halves.push_back(*std::move(table));
  }
  const DeviceBuffer<Bf16> other(static_cast<size_t>(16 * Whole::kHidden));
  const auto by_batch = [&](GroupedFfnParams params) -> absl::Status {
    if (params.rows_max > 16) return LaunchExpertFfn(params, nullptr);
    ResidualParams sum{params.rows_max, Whole::kHidden, params.out, other.get()};
    params.table = &halves[0];
    RETURN_IF_ERROR(LaunchExpertFfn(params, nullptr));
    params.table = &halves[1];
    params.out = other.get();
    RETURN_IF_ERROR(LaunchExpertFfn(params, nullptr));
    return LaunchResidual(sum, nullptr);
  };
  EXPECT_EQ(whole.Different(64, 0, by_batch), 0) << "the operation itself";
  const int64_t different = whole.Different(16, 0, by_batch);
  std::printf("%ld of %ld rows differ with the second product in two parts\n", different,
              Whole::kRows);
  EXPECT_GT(different, 100);  // many hold NaN either way
}

TEST_F(ExpertFfnTest, LaunchesBesideACompetingKernelAgree) {
  struct Case {
    int64_t hidden, intermediate;
    std::vector<int64_t> counts;
  };
  // Every width of tile; and rows that are gathered once for all columns.
  for (const Case& c : {Case{1024, 384, {16, 1, 0, 40, 7, 130, 75, 64, 20, 113}},
                        Case{272, 2048, {3, 1700, 300, 0, 1290, 97}}}) {
    const Experts experts(static_cast<int64_t>(c.counts.size()), c.hidden, c.intermediate, 11);
    const int64_t rows = std::accumulate(c.counts.begin(), c.counts.end(), int64_t{0});
    SCOPED_TRACE(rows);
    const Sources sources(rows, c.hidden, 12);
    const ExpertWorkspace workspace = WorkspaceFor(experts, rows);
    Call call(experts, sources, c.counts, RandomIndex(rows, rows, 13), rows, workspace);
    const DeviceBuffer<Bf16> out(call.out_size), other(call.out_size);
    ExpectEqualLaunches({{{{out.get(), 2 * call.out_size}}, {{other.get(), 2 * call.out_size}}}},
                        [&](int set, cudaStream_t stream) {
                          call.params.out = set == 0 ? out.get() : other.get();
                          return LaunchExpertFfn(call.params, stream);
                        });
  }
}

TEST_F(ExpertFfnTest, WhatTheKernelInFrontWritesIsWaitedFor) {
  const Experts experts(4, 1024, 384, 15);
  constexpr int64_t kRows = 151;
  const Sources sources(kRows, 1024, 16);
  const ExpertWorkspace workspace = WorkspaceFor(experts, kRows);
  Call call(experts, sources, {16, 1, 4, 130}, RandomIndex(kRows, kRows, 17), kRows, workspace);
  DeviceBuffer<Bf16> out(call.out_size);
  call.params.out = out.get();
  ASSERT_STATUS_OK(LaunchExpertFfn(call.params, nullptr));
  const uint64_t expected = HashOf(out.Download());
  const auto run_behind = [&](void* input, size_t bytes, const char* what) {
    out.Poison();
    const LateInput late(input, bytes);
    ASSERT_STATUS_OK(LaunchExpertFfn(call.params, nullptr));
    EXPECT_EQ(HashOf(out.Download()), expected) << what;
  };
  run_behind(call.codes.get(), call.codes.count(), "codes");
  run_behind(call.scales.get(), call.scales.count() * sizeof(float), "scales");
  run_behind(call.offsets.get(), call.offsets.count() * sizeof(int32_t), "row offsets");
  run_behind(call.index.get(), call.index.count() * sizeof(int32_t), "row index");
}

TEST_F(ExpertFfnTest, WhatItCannotTakeIsRefusedByName) {
  GroupedFfnParams params;
  EXPECT_TRUE(LaunchExpertFfn(params, nullptr).ok()) << "no rows";
  const Experts experts(1, 256, 128, 14);
  const ExpertWorkspace workspace = WorkspaceFor(experts, 4);
  params.rows_max = 5;
  const auto refused = [&](const char* what) {
    const absl::Status status = LaunchExpertFfn(params, nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(what), absl::string_view::npos) << status.message();
  };
  refused("table is null");
  params.table = experts.table.get();
  refused("workspace is null");
  params.workspace = &workspace;
  params.num_experts = 2;
  refused("num_experts is 2");
  params.num_experts = 1;
  refused("rows_max is 5");
  params.rows_max = 4;
  refused("row_offsets is null");
  const absl::Status table = ExpertTable::Create(100, 128, {}).status();
  EXPECT_NE(table.message().find("hidden"), absl::string_view::npos) << table.message();
  const absl::Status missing = ExpertTable::Create(256, 128, {ExpertMatrices{}}).status();
  EXPECT_NE(missing.message().find("expert 0: gate_proj is null"), absl::string_view::npos)
      << missing.message();
}

// The kernel in front lets the next one start at once and reads late what that one overwrites.
TEST_F(ExpertFfnTest, OutputsAreLeftAloneUntilTheKernelInFrontHasReadThem) {
  const Experts experts(4, 1024, 384, 18);
  constexpr int64_t kRows = 151;
  const Sources sources(kRows, 1024, 19);
  const ExpertWorkspace workspace = WorkspaceFor(experts, kRows);
  Call call(experts, sources, {16, 1, 4, 130}, RandomIndex(kRows, kRows, 20), kRows, workspace);
  const DeviceBuffer<Bf16> out(call.out_size);
  call.params.out = out.get();
  ASSERT_STATUS_OK(LaunchExpertFfn(call.params, nullptr));  // a first launch may wait for others
  const uint64_t expected = HashOf(out.Download());
  const auto run_behind_reader = [&](void* memory, size_t bytes, const char* what) {
    const LateReader reader(memory, bytes);
    ASSERT_STATUS_OK(LaunchExpertFfn(call.params, nullptr));
    EXPECT_TRUE(reader.FoundTheFilling()) << what;
    EXPECT_EQ(HashOf(out.Download()), expected) << what;
  };
  run_behind_reader(out.get(), out.count() * sizeof(Bf16), "output");
  run_behind_reader(workspace.codes(), static_cast<size_t>(kRows * workspace.intermediate()),
                    "requantised rows");
}

// What every row of a large batch is to be: expert after expert, all sources in one small batch.
std::vector<Bf16> OfEverySource(const Experts& experts, const Sources& sources, int64_t count,
                                const ExpertWorkspace& workspace) {
  std::vector<int32_t> identity(static_cast<size_t>(count));
  std::iota(identity.begin(), identity.end(), 0);
  std::vector<Bf16> all;
  for (size_t e = 0; e < experts.all.size(); ++e) {
    std::vector<int64_t> counts(experts.all.size(), 0);
    counts[e] = count;
    const std::vector<Bf16> out = RunFfn(experts, sources, counts, identity, count, workspace);
    all.insert(all.end(), out.begin(), out.end());
  }
  return all;
}

// Batches large enough that wide tiles share their rows, full ones and others, beside small tiles
// that do not; in the last case long enough to follow the tile that gathers. On a GPU with more
// than 138 multiprocessors nothing would be shared.
TEST_F(ExpertFfnTest, RowsGatheredForAllColumnsAreThoseOfSmallBatches) {
  struct Case {
    int64_t hidden, intermediate;
    std::vector<int64_t> counts;
  };
  constexpr int64_t kSources = 64;
  for (const Case& c : {Case{272, 2048, {3, 1700, 300, 0, 1290, 97}},
                        Case{1168, 1040, {5, 3000, 0, 256, 255, 2600}},
                        Case{2320, 2048, {90, 1700, 300, 113, 1290, 97}},
                        // The most tiles that share for so many rows: the workspace is full.
                        Case{272, 2048, std::vector<int64_t>(26, 81)}}) {
    const Experts experts(static_cast<int64_t>(c.counts.size()), c.hidden, c.intermediate, 18);
    const Sources sources = WithHostileNeighbours(kSources, c.hidden, 19);
    const int64_t rows = std::accumulate(c.counts.begin(), c.counts.end(), int64_t{0});
    const ExpertWorkspace workspace = WorkspaceFor(experts, rows);
    const std::vector<Bf16> expected = OfEverySource(experts, sources, kSources, workspace);
    for (uint64_t seed = 20; seed < 23; ++seed) {
      const std::vector<int32_t> index = RandomIndex(rows, kSources, seed);
      const std::vector<Bf16> out = RunFfn(experts, sources, c.counts, index, rows, workspace);
      int64_t row = 0;
      for (size_t e = 0; e < c.counts.size(); ++e) {
        for (int64_t i = 0; i < c.counts[e]; ++i, ++row) {
          const int64_t source =
              static_cast<int64_t>(e) * kSources + index[static_cast<size_t>(row)];
          ASSERT_EQ(std::memcmp(out.data() + row * c.hidden, expected.data() + source * c.hidden,
                                static_cast<size_t>(c.hidden) * sizeof(Bf16)),
                    0)
              << c.hidden << " x " << c.intermediate << ": row " << i << " of expert " << e;
        }
      }
    }
  }
}

// Sources in memory of the host, which are gathered so slowly that tiles behind the one that does
// it come to blocks that are not there. Experts of one row keep other multiprocessors busy until
// then.
TEST_F(ExpertFfnTest, RowsThatAreGatheredSlowlyAreWaitedFor) {
  constexpr int64_t kHidden = 2320, kSmall = 16, kRows = kSmall + 60 * 128;
  const Experts one(1, kHidden, 2048, 21);
  auto table = ExpertTable::Create(kHidden, 2048,
                                   std::vector<ExpertMatrices>(kSmall + 1, one.all[0]->Device()));
  ASSERT_STATUS_OK(table.status());
  std::vector<int64_t> counts(kSmall, 1);
  counts.push_back(kRows - kSmall);
  const Sources sources(kRows, kHidden, 22);
  const ExpertWorkspace workspace = WorkspaceFor(one, kRows);
  Call call(one, sources, counts, {}, kRows, workspace);
  DeviceBuffer<Bf16> out(call.out_size);
  call.params.table = &*table;
  call.params.out = out.get();
  ASSERT_STATUS_OK(LaunchExpertFfn(call.params, nullptr));
  const uint64_t expected = HashOf(out.Download());

  void* host = nullptr;
  ExpectCudaOk(cudaMallocHost(&host, sources.codes.size()), "host memory");
  ASSERT_NE(host, nullptr);
  std::memcpy(host, sources.codes.data(), sources.codes.size());
  call.params.x_codes = static_cast<const E4m3*>(host);
  for (int run = 0; run < 4; ++run) {
    out.Poison();
    ExpectCudaOk(cudaMemset(workspace.gathered_codes(), 0x7f,
                            static_cast<size_t>(workspace.gathered_rows_max() * kHidden)),
                 "NaN where rows are gathered");
    ASSERT_STATUS_OK(LaunchExpertFfn(call.params, nullptr));
    EXPECT_EQ(HashOf(out.Download()), expected) << "run " << run;
  }
  ExpectCudaOk(cudaFreeHost(host), "host memory");
}

}  // namespace
}  // namespace moebius::kernels::cuda
