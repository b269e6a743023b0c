// Choosing: experts from gate logits, packed rows from experts, tokens from logits.

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/cuda/benches.h"
#include "kernels/cuda/bf16_linear/bf16_linear.h"
#include "kernels/cuda/expert_groups/expert_groups.h"
#include "kernels/cuda/gate_select/gate_select.h"
#include "kernels/cuda/sampling/sampling.h"

namespace moebius::bench {
namespace {

using kernels::GateConfig;
using kernels::SamplingParams;

constexpr int kExperts = 256, kTopK = 8;
// Small inputs were just written by the kernel before, so they are timed as they lie in L2.
constexpr int kLaunches = 64;

GateConfig DeepSeekV3() {
  GateConfig config;
  config.n_routed_experts = kExperts;
  config.num_experts_per_tok = kTopK;
  config.n_group = 8;
  config.topk_group = 4;
  config.routed_scaling_factor = 2.5f;
  return config;
}

void MeasureGate(Report& report, int64_t m) {
  std::vector<DeviceArray<float>> logits;
  for (uint64_t i = 0; i < 4; ++i) logits.push_back(RandomFloats(m * kExperts, i, 2.0f));
  const DeviceArray<float> bias = RandomFloats(kExperts, 9, 0.1f);
  const DeviceArray<ExpertId> experts(m * kTopK);
  const DeviceArray<float> weights(m * kTopK);
  const DeviceArray<int32_t> offsets(kExperts + 1), rows(m * kTopK), packed(m * kTopK);
  kernels::GateSelectParams params;
  params.m = m;
  params.config = DeepSeekV3();
  params.bias = bias.get();
  params.experts = experts.get();
  params.weights = weights.get();
  Row row;
  row.kernel = "gate_select";
  row.shape = absl::StrCat("top 8 of 256, 4 of 8 groups, M=", m);
  row.timing = TimeGraph(kLaunches, [&](int i, cudaStream_t stream) {
    params.logits = logits[static_cast<size_t>(i % 4)].get();
    return kernels::cuda::LaunchGateSelect(params, stream);
  });
  row.bytes = static_cast<double>(m) * (4 * kExperts + 8 * kTopK) + 4 * kExperts;
  if (m == 128) row.aim_us = 2.5;
  row.peer = m <= 128 ? "Triton 2.4-2.5, CUDA of SGLang 4.3 (up to 64 tokens)" : "";
  report.Add(row);

  kernels::cuda::ExpertGroupsParams groups;
  groups.m = m;
  groups.top_k = kTopK;
  groups.num_experts = kExperts;
  groups.experts = experts.get();
  groups.expert_offsets = offsets.get();
  groups.row_index = rows.get();
  groups.packed_rows = packed.get();
  row = {};
  row.kernel = "expert_groups";
  row.shape = absl::StrCat("top 8 of 256, M=", m);
  row.timing = TimeGraph(kLaunches, [&](int, cudaStream_t stream) {
    return kernels::cuda::LaunchExpertGroups(groups, stream);
  });
  row.bytes = static_cast<double>(m) * 12 * kTopK + 4 * kExperts;
  report.Add(row);
}

// Gate logits and the choice from them, as a layer launches them: the second starts beside the
// first. The pair is one row.
void MeasureRouter(Report& report, int64_t m) {
  constexpr int64_t kHidden = 7168;
  const int copies = CopiesPastL2(2 * kExperts * kHidden);
  std::vector<DeviceArray<Bf16>> weights_of_gate;
  for (int i = 0; i < copies; ++i)
    weights_of_gate.push_back(RandomBf16(kExperts * kHidden, 40 + static_cast<uint64_t>(i), 0.02f));
  const DeviceArray<Bf16> x = RandomBf16(m * kHidden, 99);
  const DeviceArray<float> logits(m * kExperts), bias = RandomFloats(kExperts, 9, 0.1f);
  const DeviceArray<ExpertId> experts(m * kTopK);
  const DeviceArray<float> weights(m * kTopK);
  kernels::cuda::Bf16LinearParams gate;
  gate.m = m;
  gate.n = gate.out_stride = kExperts;
  gate.k = gate.x_stride = gate.weight_stride = kHidden;
  gate.x = x.get();
  gate.out_f32 = logits.get();
  kernels::GateSelectParams select;
  select.m = m;
  select.config = DeepSeekV3();
  select.logits = logits.get();
  select.bias = bias.get();
  select.experts = experts.get();
  select.weights = weights.get();
  Row row;
  row.kernel = "gate and choice";
  row.shape = absl::StrCat("256 x 7168, float32 logits, top 8, M=", m);
  row.timing = TimeGraph(copies, [&](int i, cudaStream_t stream) {
    gate.weight = weights_of_gate[static_cast<size_t>(i)].get();
    const absl::Status status = kernels::cuda::LaunchBf16Linear(gate, stream);
    return status.ok() ? kernels::cuda::LaunchGateSelect(select, stream) : status;
  });
  row.bytes = 2.0 * static_cast<double>((kExperts + m) * kHidden) +
              static_cast<double>(m) * (4 * kExperts + 8 * kTopK);
  row.flops = 2.0 * static_cast<double>(m * kExperts * kHidden);
  row.flop_rate = kBf16FlopRate;
  if (m == 128) row.aim_us = 6;
  report.Add(row);
}

void MeasureSampling(Report& report) {
  constexpr int64_t kRows = 128, kVocab = 129280;
  const int copies = CopiesPastL2(4 * kRows * kVocab);
  std::vector<DeviceArray<float>> logits;
  for (int i = 0; i < copies; ++i)
    logits.push_back(RandomFloats(kRows * kVocab, 20 + static_cast<uint64_t>(i), 1.0f));
  DeviceArray<uint64_t> index(kRows);
  DeviceArray<SamplingParams> sampling(kRows);
  const DeviceArray<TokenId> tokens(kRows);
  const DeviceArray<float> logprobs(kRows);
  kernels::SampleParams params;
  params.m = kRows;
  params.vocab = params.logits_stride = kVocab;
  params.params = sampling.get();
  params.token_index = index.get();
  params.tokens = tokens.get();
  params.logprobs = logprobs.get();
  std::vector<uint64_t> places(kRows);
  for (size_t i = 0; i < places.size(); ++i) places[i] = i;
  index.Upload(places.data());
  struct Case {
    const char* name;
    SamplingParams params;
  };
  for (const Case& c :
       {Case{"greedy", {}}, Case{"temperature 1", {.temperature = 1.0f, .seed = 1}},
        Case{"temperature 0.7", {.temperature = 0.7f, .seed = 1}},
        Case{"top-k 50, top-p 0.95", {.temperature = 1.0f, .top_k = 50, .top_p = 0.95f, .seed = 1}},
        Case{"top-p 0.95", {.temperature = 1.0f, .top_p = 0.95f, .seed = 1}},
        Case{"top-k 1000", {.temperature = 1.0f, .top_k = 1000, .seed = 1}}}) {
    const std::vector<SamplingParams> all(kRows, c.params);
    sampling.Upload(all.data());
    Row row;
    row.kernel = "sampling";
    row.shape = absl::StrCat("128 x 129280, ", c.name);
    row.timing = TimeGraph(std::max(copies, 8), [&](int i, cudaStream_t stream) {
      params.logits = logits[static_cast<size_t>(i % copies)].get();
      return kernels::cuda::LaunchSample(params, stream);
    });
    row.bytes = 4.0 * kRows * kVocab;
    row.aim_us = 30;
    report.Add(row);
  }

  kernels::TokenLogprobsParams given;
  given.m = kRows;
  given.vocab = given.logits_stride = kVocab;
  given.per_row = 1;
  given.tokens = tokens.get();  // the last draws
  given.logprobs = logprobs.get();
  Row row;
  row.kernel = "token_logprobs";
  row.shape = "128 x 129280, one a row";
  row.timing = TimeGraph(std::max(copies, 8), [&](int i, cudaStream_t stream) {
    given.logits = logits[static_cast<size_t>(i % copies)].get();
    return kernels::cuda::LaunchTokenLogprobs(given, stream);
  });
  row.bytes = 4.0 * kRows * kVocab;
  report.Add(row);

  params.m = 1;
  row = {};
  row.kernel = "sampling";
  row.shape = "1 x 129280, top-k 1000";
  row.timing = TimeGraph(kLaunches, [&](int i, cudaStream_t stream) {
    params.logits = logits[static_cast<size_t>(i % copies)].get() + i % 128 * kVocab;
    return kernels::cuda::LaunchSample(params, stream);
  });
  row.bytes = 4.0 * kVocab;
  report.Add(row);
}

}  // namespace

void BenchChoose(Report& report) {
  for (const int64_t m : {1, 16, 128, 4096}) MeasureGate(report, m);
  for (const int64_t m : {1, 16, 128}) MeasureRouter(report, m);
  MeasureSampling(report);
}

}  // namespace moebius::bench
