// The FP8 linear layer at DeepSeek-V3's dense shapes.

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/cuda/benches.h"
#include "kernels/cuda/fp8_linear/fp8_linear.h"

namespace moebius::bench {
namespace {

struct Layer {
  int64_t n, k;
  double must_us, aim_us;    // up to 64 rows
  const char* cublas;        // cuBLASLt with the same scales, few rows
  const char* cublas_large;  // 4,096 rows
};

void Measure(Report& report, const Layer& layer, int64_t m) {
  const int64_t n = layer.n, k = layer.k;
  const int64_t k_blocks = (k + 127) / 128, n_blocks = (n + 127) / 128;
  const int copies = CopiesPastL2(n * k);
  std::vector<DeviceArray<E4m3>> weights;
  for (int i = 0; i < copies; ++i) weights.push_back(RandomE4m3(n * k, 1 + i));
  const DeviceArray<E4m3> x = RandomE4m3(m * k, 99);
  const DeviceArray<float> x_scales = RandomScales(m * k_blocks, 98, 0.01f);
  const DeviceArray<float> weight_scales = RandomScales(n_blocks * k_blocks, 97, 0.001f);
  const DeviceArray<Bf16> out(m * n);
  kernels::cuda::Fp8LinearParams params;
  params.m = m;
  params.n = params.out_stride = n;
  params.k = k;
  params.x = x.get();
  params.x_scales = x_scales.get();
  params.weight_scales = weight_scales.get();
  params.out = out.get();
  Row row;
  row.kernel = "fp8_linear";
  row.shape = absl::StrCat(n, " x ", k, ", M=", m);
  row.timing = TimeGraph(std::max(copies, 16), [&](int i, cudaStream_t stream) {
    params.weight = weights[static_cast<size_t>(i % copies)].get();
    return kernels::cuda::LaunchFp8Linear(params, stream);
  });
  row.bytes = static_cast<double>(n * k + m * k + 4 * (m + n_blocks) * k_blocks + 2 * m * n);
  row.flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  row.flop_rate = kFp8FlopRate;
  if (m <= 64) {
    row.must_us = layer.must_us;
    row.aim_us = layer.aim_us;
  }
  row.peer = absl::StrCat("cuBLASLt ", m <= 64 ? layer.cublas : layer.cublas_large);
  report.Add(row);
}

}  // namespace

void BenchFp8Linear(Report& report) {
  for (const Layer& layer :
       {Layer{2112, 7168, 10.5, 7.5, "16", "112"}, Layer{24576, 1536, 15, 12, "17", "280"},
        Layer{7168, 16384, 38, 33, "40", "761"}, Layer{4096, 7168, 13, 10, "17", "191"},
        Layer{7168, 2048, 8.5, 6.5, "10", "105"}}) {
    for (const int64_t m : {1, 16, 64, 4096}) Measure(report, layer, m);
  }
}

}  // namespace moebius::bench
