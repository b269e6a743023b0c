// cuda_bench [--json FILE] [--passed TESTS] [--failed TESTS] [--sanitized TESTS] [NAME ...]: times
// the CUDA kernels, all or those named, as one table. FILE also records what tests of the same
// build did before (TestResults). Needs a Hopper GPU.

#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "bench/cuda/benches.h"

int main(int argc, char** argv) {
  using namespace moebius::bench;
  const std::vector<std::pair<std::string, void (*)(Report&)>> benches = {
      {"mla_attention", BenchMlaAttention},
      {"expert_ffn", BenchExpertFfn},
      {"fp8_linear", BenchFp8Linear},
      {"bf16_linear", BenchBf16Linear},
      {"choose", BenchChoose},
      {"rms_norm", BenchRmsNorm},
      {"quantize_rows", BenchQuantizeRows},
      {"rope_and_cache", BenchRopeAndCache},
      {"combine", BenchCombine},
      {"swiglu", BenchSwiGlu},
      {"residual", BenchResidual},
      {"embedding", BenchEmbedding},
      {"row_digest", BenchRowDigest},
      {"dequantize_weight", BenchDequantizeWeight},
  };
  TestResults tests;
  std::string json, command = "cuda_bench";
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    bool option = false;
    for (const auto& [name, value] : {std::pair<const char*, std::string*>{"--json", &json},
                                      {"--passed", &tests.passed},
                                      {"--failed", &tests.failed},
                                      {"--sanitized", &tests.sanitized}}) {
      if (std::strcmp(argv[i], name) != 0 || i + 1 >= argc) continue;
      *value = argv[++i];
      option = true;
      break;
    }
    if (option) continue;
    wanted.push_back(argv[i]);
    command += " " + wanted.back();
  }
  for (const std::string& name : wanted) {
    bool known = false;
    for (const auto& bench : benches) known = known || bench.first == name;
    if (!known) {
      std::fprintf(stderr, "unknown benchmark '%s'; there are:\n", name.c_str());
      for (const auto& bench : benches) std::fprintf(stderr, "  %s\n", bench.first.c_str());
      return 2;
    }
  }
  Report report(ReadBandwidth());
  for (const auto& [name, bench] : benches) {
    bool run = wanted.empty();
    for (const std::string& other : wanted) run = run || other == name;
    if (run) bench(report);
  }
  std::printf("%d rows above their must\n", report.MissedMusts());
  if (!json.empty()) report.WriteJson(json, command, tests);
}
