// Time of the FP8 linear layer at DeepSeek-V3's dense shapes: a CUDA graph of launches over weights
// that together exceed L2, random codes, median of replays with its spread. Bytes: weights, scales,
// rows in and out, once. Prints one table; needs a Hopper GPU.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "base/prng.h"
#include "kernels/cuda/fp8_linear/fp8_linear.h"

namespace {

using moebius::Bf16;
using moebius::E4m3;

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* Allocate(const std::vector<T>& values) {
  T* pointer = nullptr;
  Check(cudaMalloc(reinterpret_cast<void**>(&pointer), values.size() * sizeof(T)));
  Check(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return pointer;
}

std::vector<E4m3> Codes(int64_t count, uint64_t seed) {
  moebius::Prng random(seed);
  std::vector<E4m3> codes(static_cast<size_t>(count));
  for (E4m3& code : codes) {  // finite, exponents of a normal weight matrix
    const uint64_t bits = random.Next();
    code.bits = static_cast<uint8_t>((bits & 0x87) | ((4 + (bits >> 8) % 8) << 3));
  }
  return codes;
}

void Measure(int64_t n, int64_t k, int64_t m) {
  using moebius::kernels::cuda::Fp8LinearParams;
  const int64_t k_blocks = (k + 127) / 128, n_blocks = (n + 127) / 128;
  const int copies = static_cast<int>(std::max<int64_t>(2, 200'000'000 / (n * k) + 1));
  std::vector<E4m3*> weights;
  for (int i = 0; i < copies; ++i)
    weights.push_back(Allocate(Codes(n * k, 1 + static_cast<uint64_t>(i))));
  Fp8LinearParams params;
  params.m = m;
  params.n = params.out_stride = n;
  params.k = k;
  params.x = Allocate(Codes(m * k, 99));
  params.x_scales = Allocate(std::vector<float>(static_cast<size_t>(m * k_blocks), 0.01f));
  params.weight_scales =
      Allocate(std::vector<float>(static_cast<size_t>(n_blocks * k_blocks), 0.001f));
  Bf16* const out = Allocate(std::vector<Bf16>(static_cast<size_t>(m * n)));
  params.out = out;

  cudaStream_t stream;
  Check(cudaStreamCreate(&stream));
  const int launches = std::max(copies, 16);
  cudaGraph_t graph;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < launches; ++i) {
    params.weight = weights[static_cast<size_t>(i % copies)];
    const absl::Status status = moebius::kernels::cuda::LaunchFp8Linear(params, stream);
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", status.ToString().c_str());
      std::exit(1);
    }
  }
  Check(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t replay;
  Check(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin));
  Check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 25; ++i) {
    Check(cudaEventRecord(begin, stream));
    Check(cudaGraphLaunch(replay, stream));
    Check(cudaEventRecord(end, stream));
    Check(cudaEventSynchronize(end));
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 5) times.push_back(milliseconds * 1000 / static_cast<float>(launches));
  }
  std::sort(times.begin(), times.end());
  const double us = times[times.size() / 2];
  const double bytes =
      static_cast<double>(n * k + m * k + 4 * (m + n_blocks) * k_blocks + 2 * m * n);
  std::printf("%6ld x %5ld  m %5ld  %8.1f us (%.1f .. %.1f)  %6.0f GB/s  %7.1f TFLOP/s\n", n, k, m,
              us, times.front(), times.back(), bytes / us * 1e-3, 2.0 * n * k * m / us * 1e-6);
  Check(cudaGraphExecDestroy(replay));
  Check(cudaGraphDestroy(graph));
  for (E4m3* weight : weights) Check(cudaFree(weight));
  for (const void* pointer :
       {static_cast<const void*>(params.x), static_cast<const void*>(params.x_scales),
        static_cast<const void*>(params.weight_scales), static_cast<const void*>(out)}) {
    Check(cudaFree(const_cast<void*>(pointer)));
  }
  Check(cudaStreamDestroy(stream));
}

}  // namespace

int main() {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{2112, 7168},
                             {24576, 1536},
                             {7168, 16384},
                             {4096, 7168},
                             {7168, 2048}}) {
    for (const int64_t m : {1, 16, 64, 4096}) Measure(n, k, m);
  }
}
