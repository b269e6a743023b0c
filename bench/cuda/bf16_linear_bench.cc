// The BF16 linear layers of DeepSeek-V3: LM head, eh_proj of MTP, gate logits, kv_b's absorption.

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/cuda/benches.h"
#include "kernels/cuda/bf16_linear/bf16_linear.h"

namespace moebius::bench {
namespace {

using kernels::cuda::Bf16LinearParams;

// Times `params` at m rows; its strides are set, its pointers are not.
void Measure(Report& report, const std::string& name, Bf16LinearParams params, int64_t m, bool f32,
             double aim_us, const std::string& peer) {
  params.m = m;
  const int64_t weight_size =
      params.heads == 1 ? params.n * params.k : params.heads * params.weight_head_stride;
  const int copies = CopiesPastL2(weight_size * 2);
  std::vector<DeviceArray<Bf16>> weights;
  for (int i = 0; i < copies; ++i) weights.push_back(RandomBf16(weight_size, 1 + i, 0.02f));
  const DeviceArray<Bf16> x = RandomBf16(m * params.x_stride, 99);
  const DeviceArray<float> out(m * params.out_stride);
  params.x = x.get();
  if (f32) {
    params.out_f32 = out.get();
  } else {
    params.out_bf16 = reinterpret_cast<Bf16*>(out.get());
  }
  Row row;
  row.kernel = "bf16_linear";
  row.shape = absl::StrCat(name, ", M=", m);
  row.timing = TimeGraph(std::max(copies, 16), [&](int i, cudaStream_t stream) {
    params.weight = weights[static_cast<size_t>(i % copies)].get();
    return kernels::cuda::LaunchBf16Linear(params, stream);
  });
  const int64_t products = params.heads * params.n * params.k;
  row.bytes = 2.0 * static_cast<double>(products + m * params.heads * params.k) +
              (f32 ? 4.0 : 2.0) * static_cast<double>(m * params.heads * params.n);
  row.flops = 2.0 * static_cast<double>(m) * static_cast<double>(products);
  row.flop_rate = kBf16FlopRate;
  row.aim_us = aim_us;
  row.peer = peer;
  report.Add(row);
}

Bf16LinearParams Matrix(int64_t n, int64_t k) {
  Bf16LinearParams params;
  params.n = params.out_stride = n;
  params.k = params.x_stride = params.weight_stride = k;
  return params;
}

constexpr int64_t kHeads = 128;

}  // namespace

void BenchBf16Linear(Report& report) {
  for (const int64_t m : {1, 16, 64, 128}) {
    Measure(report, "LM head 129280 x 7168, float32", Matrix(129'280, 7168), m, true, 450,
            m == 1     ? "cuBLASLt 420"
            : m == 128 ? "cuBLASLt 470"
                       : "");
  }
  for (const int64_t m : {1, 16, 64, 128, 4096})
    Measure(report, "eh_proj 7168 x 14336", Matrix(7168, 14'336), m, false, 0, "");
  for (const int64_t m : {1, 16, 128, 4096})
    Measure(report, "gate 256 x 7168, float32", Matrix(256, 7168), m, true, 0, "");

  Bf16LinearParams query = Matrix(512, 128);  // kv_b's rows of k_nope, contracted
  query.heads = kHeads;
  query.weight_transposed = true;
  query.x_head_stride = 192;
  query.x_stride = kHeads * query.x_head_stride;
  query.weight_stride = 512;
  query.weight_head_stride = 256 * 512;
  query.out_head_stride = 576;
  query.out_stride = kHeads * query.out_head_stride;
  Bf16LinearParams output = Matrix(128, 512);  // kv_b's rows of v
  output.heads = kHeads;
  output.x_head_stride = 512;
  output.x_stride = kHeads * output.x_head_stride;
  output.weight_head_stride = 256 * 512;
  output.out_head_stride = 128;
  output.out_stride = kHeads * output.out_head_stride;
  for (const int64_t m : {1, 64, 128, 4096}) {
    Measure(report, "absorb q: 128 heads of 512 x 128", query, m, false, 0, "");
    Measure(report, "absorb out: 128 heads of 128 x 512", output, m, false, 0, "");
  }
}

}  // namespace moebius::bench
