// The FP8 linear layer at DeepSeek-V3's dense shapes, cuBLASLt beside it where it is present.

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "bench/cuda/benches.h"
#include "bench/cuda/cublaslt_peer.h"
#include "kernels/cuda/fp8_linear/fp8_linear.h"

namespace moebius::bench {
namespace {

struct Layer {
  int64_t n, k;
  double must_us, aim_us;  // up to 64 rows
  double cublas_us;        // 4,096 rows; the aim is to be within 15 %
};

void Measure(Report& report, const Layer& layer, int64_t m) {
  const int64_t n = layer.n, k = layer.k;
  const int64_t k_blocks = (k + 127) / 128, n_blocks = (n + 127) / 128;
  const int copies = CopiesPastL2(n * k);
  std::vector<DeviceArray<E4m3>> weights;
  for (int i = 0; i < copies; ++i) weights.push_back(RandomE4m3(n * k, 1 + i));
  const int64_t rows = (m + 3) / 4 * 4;
  const DeviceArray<E4m3> x = RandomE4m3(rows * k, 99);
  const DeviceArray<float> x_scales = RandomScales(rows * k_blocks, 98, 0.01f);
  const DeviceArray<float> weight_scales =
      RandomScales(n_blocks * ((k_blocks + 3) / 4 * 4), 97, 0.001f);
  const DeviceArray<Bf16> out(rows * n);
  const int launches = std::max(copies, 16);
  const auto weight = [&](int i) { return weights[static_cast<size_t>(i % copies)].get(); };

  std::string why;
  const double peer = TimeCublasLtFp8(
      {rows, n, k, x.get(), x_scales.get(), weight(0), weight_scales.get(), out.get()}, launches,
      weight, &why);

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
  row.bytes = static_cast<double>(n * k + m * k + 4 * (m + n_blocks) * k_blocks + 2 * m * n);
  row.flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  row.flop_rate = kFp8FlopRate;
  if (m <= 64) {
    row.must_us = layer.must_us;
    row.aim_us = layer.aim_us;
  } else if (m == 4096) {
    row.aim_us = 1.15 * layer.cublas_us;
  }
  row.peer = peer > 0 ? absl::StrFormat("cuBLASLt %.1f (its launches do not overlap)", peer)
                      : absl::StrCat("cuBLASLt: ", why);
  for (const bool resident : {false, true}) {
    params.weights_resident = resident;
    row.shape = absl::StrCat(n, " x ", k, ", M=", m, resident ? ", weights ahead" : "");
    row.timing = TimeGraph(launches, [&](int i, cudaStream_t stream) {
      params.weight = weight(i);
      return kernels::cuda::LaunchFp8Linear(params, stream);
    });
    report.Add(row);
  }
}

}  // namespace

void BenchFp8Linear(Report& report) {
  const Layer layers[] = {{2112, 7168, 10.5, 7.5, 112},
                          {24576, 1536, 15, 12, 280},
                          {7168, 16384, 38, 33, 761},
                          {4096, 7168, 13, 10, 191},
                          {7168, 2048, 8.5, 6.5, 105}};
  // Few rows of all shapes first: many rows heat the card until its clock falls.
  for (const int64_t m : {1, 16, 64, 128, 256, 512, 1024, 4096}) {
    for (const Layer& layer : layers) Measure(report, layer, m);
  }
}

}  // namespace moebius::bench
