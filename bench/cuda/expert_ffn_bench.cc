// The grouped expert FFN at DeepSeek-V3's expert size: gather, both products, SwiGLU, requantise
// and BF16 rows out, in one launch.

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/prng.h"
#include "bench/cuda/benches.h"
#include "kernels/cuda/expert_ffn/expert_ffn.h"

namespace moebius::bench {
namespace {

using kernels::cuda::ExpertMatrices;
using kernels::cuda::ExpertTable;
using kernels::cuda::ExpertWorkspace;
using kernels::cuda::GroupedFfnParams;

constexpr int64_t kHidden = 7168;
constexpr int64_t kIntermediate = 2048;
constexpr int64_t kScales = kHidden / 128 * (kIntermediate / 128);

// All experts' weights: 1.4 GB, so that no launch finds any of them in L2.
struct Experts {
  explicit Experts(int count) {
    std::vector<ExpertMatrices> matrices;
    for (int e = 0; e < count; ++e) {
      for (uint64_t i = 0; i < 3; ++i) {
        const uint64_t seed = 3 * static_cast<uint64_t>(e) + i;
        codes.push_back(RandomE4m3(kHidden * kIntermediate, 1 + seed));
        scales.push_back(RandomScales(kScales, 1000 + seed, 0.001f));
      }
      const size_t at = codes.size() - 3;
      matrices.push_back({codes[at].get(), codes[at + 1].get(), codes[at + 2].get(),
                          scales[at].get(), scales[at + 1].get(), scales[at + 2].get()});
    }
    auto created = ExpertTable::Create(kHidden, kIntermediate, matrices);
    CheckOk(created.status());
    table = std::make_unique<ExpertTable>(*std::move(created));
  }
  std::vector<DeviceArray<E4m3>> codes;
  std::vector<DeviceArray<float>> scales;
  std::unique_ptr<ExpertTable> table;
};

Row Measure(const Experts& experts, const std::vector<int64_t>& counts, bool with_down) {
  std::vector<int32_t> offsets = {0};
  for (const int64_t count : counts)
    offsets.push_back(offsets.back() + static_cast<int32_t>(count));
  const int64_t rows = offsets.back();
  std::vector<int32_t> index(static_cast<size_t>(rows));
  Prng random(5);
  for (int32_t& i : index) i = static_cast<int32_t>(random.Below(static_cast<uint64_t>(rows)));
  DeviceArray<int32_t> device_offsets(static_cast<int64_t>(offsets.size())), device_index(rows);
  device_offsets.Upload(offsets.data());
  device_index.Upload(index.data());
  const DeviceArray<E4m3> x = RandomE4m3(rows * kHidden, 99);
  const DeviceArray<float> x_scales = RandomScales(rows * kHidden / 128, 98, 0.01f);
  const DeviceArray<Bf16> out(rows * kHidden);
  auto workspace =
      ExpertWorkspace::Create(rows, kHidden, kIntermediate, static_cast<int64_t>(counts.size()));
  CheckOk(workspace.status());
  GroupedFfnParams params;
  params.table = experts.table.get();
  params.num_experts = static_cast<int64_t>(counts.size());
  params.row_offsets = device_offsets.get();
  params.rows_max = rows;
  params.x_codes = x.get();
  params.x_scales = x_scales.get();
  params.row_index = device_index.get();
  params.out = out.get();
  params.workspace = &*workspace;
  Row row;
  row.timing = TimeGraph(rows > 10000 ? 1 : 4, [&](int, cudaStream_t stream) {
    return with_down ? LaunchExpertFfn(params, stream) : LaunchExpertGateUp(params, stream);
  });
  const auto busy = std::count_if(counts.begin(), counts.end(), [](int64_t c) { return c > 0; });
  const double matrices = with_down ? 3.0 : 2.0;
  const double elements = static_cast<double>(kHidden * kIntermediate);
  row.bytes = static_cast<double>(busy) * matrices * (elements + 4.0 * kScales) +
              static_cast<double>(rows * (kHidden + kHidden / 32)) +
              static_cast<double>(with_down ? rows * kHidden * 2
                                            : rows * (kIntermediate + kIntermediate / 32));
  row.flops = 2.0 * matrices * static_cast<double>(rows) * elements;
  row.flop_rate = kFp8FlopRate;
  return row;
}

// Counts of `experts` when rows choose among them at random.
std::vector<int64_t> Multinomial(int64_t experts, int64_t rows) {
  std::vector<int64_t> counts(static_cast<size_t>(experts));
  Prng random(17);
  for (int64_t i = 0; i < rows; ++i) ++counts[random.Below(static_cast<uint64_t>(experts))];
  return counts;
}

}  // namespace

void BenchExpertFfn(Report& report) {
  const Experts experts(32);
  // Before the rows that draw the card's power limit, or they would be timed at its low clock.
  Row spread = Measure(experts, Multinomial(32, 32 * 32), true);
  spread.kernel = "expert_ffn";
  spread.shape = "32 experts, 1024 rows at random";
  report.Add(spread);
  // The first half alone: for the sum of phases, and, last, where tensor cores are the limit.
  Row first = Measure(experts, std::vector<int64_t>(32, 16), false);
  first.kernel = "expert_gate_up";
  first.shape = "32 experts x 16 rows";
  report.Add(first);
  struct Case {
    int64_t rows;
    double must_us, aim_us;
    const char* peer;
  };
  // From 81 rows on an expert's tiles have their operands the other way round; 127 and 255 leave
  // a row of a tile unused.
  for (const Case c : {Case{1, 0, 0, ""}, Case{4, 0, 0, "Triton 370"}, Case{8, 0, 0, "Triton 375"},
                       Case{16, 388, 350, "Triton 388"}, Case{32, 420, 360, "Triton 715"},
                       Case{64, 480, 400, "Triton 604"}, Case{80, 0, 0, ""}, Case{81, 0, 0, ""},
                       Case{112, 0, 0, ""}, Case{127, 0, 0, ""}, Case{128, 560, 460, "Triton 642"},
                       Case{255, 0, 0, ""}, Case{256, 0, 0, ""}}) {
    Row row = Measure(experts, std::vector<int64_t>(32, c.rows), true);
    row.kernel = "expert_ffn";
    row.shape = absl::StrCat("32 experts x ", c.rows, " rows");
    row.must_us = c.must_us;
    row.aim_us = c.aim_us;
    row.peer = c.peer;
    report.Add(row);
  }
  Row large = Measure(experts, std::vector<int64_t>(8, 4096), false);
  large.kernel = "expert_gate_up";
  large.shape = "8 experts x 4096 rows";
  large.aim_us = 1526;
  report.Add(large);
}

}  // namespace moebius::bench
