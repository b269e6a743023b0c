#include "bench/cuda/measure.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "base/prng.h"

namespace moebius::bench {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 132 * 8;

__device__ float Draw(uint64_t seed, int64_t i) {
  const uint64_t bits = CounterDraw(seed, 0, static_cast<uint64_t>(i));
  // The sum of four uniforms: close enough to normal, and never infinite.
  const float sum = static_cast<float>(bits & 0xffff) + static_cast<float>((bits >> 16) & 0xffff) +
                    static_cast<float>((bits >> 32) & 0xffff) + static_cast<float>(bits >> 48);
  return (sum / 65536.0f - 2.0f) * 1.7320508f;
}

__global__ void FillBf16(uint16_t* out, int64_t count, uint64_t seed, float scale) {
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += kBlocks * kThreads)
    out[i] = static_cast<uint16_t>(__float_as_uint(Draw(seed, i) * scale) >> 16);
}
__global__ void FillFloats(float* out, int64_t count, uint64_t seed, float offset, float scale) {
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += kBlocks * kThreads)
    out[i] = offset + Draw(seed, i) * scale;
}
__global__ void FillE4m3(uint8_t* out, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += kBlocks * kThreads) {
    const uint64_t bits = CounterDraw(seed, 1, static_cast<uint64_t>(i));
    out[i] = static_cast<uint8_t>((bits & 0x87) | ((4 + (bits >> 8) % 8) << 3));
  }
}

__global__ void __launch_bounds__(512) ReadAll(const uint4* data, int64_t count, uint32_t* sink) {
  uint32_t mix = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) mix ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (mix == 0x12345678u) *sink = mix;
}

}  // namespace

void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void CheckOk(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

DeviceArray<Bf16> RandomBf16(int64_t count, uint64_t seed, float scale) {
  DeviceArray<Bf16> array(count);
  FillBf16<<<kBlocks, kThreads>>>(reinterpret_cast<uint16_t*>(array.get()), count, seed, scale);
  CheckCuda(cudaGetLastError(), "RandomBf16");
  return array;
}

DeviceArray<float> RandomFloats(int64_t count, uint64_t seed, float scale) {
  DeviceArray<float> array(count);
  FillFloats<<<kBlocks, kThreads>>>(array.get(), count, seed, 0.0f, scale);
  CheckCuda(cudaGetLastError(), "RandomFloats");
  return array;
}

DeviceArray<float> RandomScales(int64_t count, uint64_t seed, float scale) {
  DeviceArray<float> array(count);
  // Draw stays within 3.5 deviations.
  FillFloats<<<kBlocks, kThreads>>>(array.get(), count, seed, scale, scale * 0.2f);
  CheckCuda(cudaGetLastError(), "RandomScales");
  return array;
}

DeviceArray<E4m3> RandomE4m3(int64_t count, uint64_t seed) {
  DeviceArray<E4m3> array(count);
  FillE4m3<<<kBlocks, kThreads>>>(reinterpret_cast<uint8_t*>(array.get()), count, seed);
  CheckCuda(cudaGetLastError(), "RandomE4m3");
  return array;
}

int CopiesPastL2(int64_t bytes) {
  constexpr int64_t kBeyondL2 = 200'000'000;  // an H200 has 60 MB
  return static_cast<int>(std::max<int64_t>(2, kBeyondL2 / std::max<int64_t>(bytes, 1) + 1));
}

Timing TimeGraph(int launches, const std::function<absl::Status(int, cudaStream_t)>& launch) {
  cudaStream_t stream;
  CheckCuda(cudaStreamCreate(&stream), "stream");
  CheckOk(launch(0, stream));  // what a first call does (attributes, modules) stays outside
  CheckCuda(cudaStreamSynchronize(stream), "first launch");
  CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < launches; ++i) CheckOk(launch(i, stream));
  cudaGraph_t graph;
  CheckCuda(cudaStreamEndCapture(stream, &graph), "capture");
  cudaGraphExec_t replay;
  CheckCuda(cudaGraphInstantiate(&replay, graph, 0), "graph");
  cudaEvent_t begin, end;
  CheckCuda(cudaEventCreate(&begin), "event");
  CheckCuda(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int i = 0; i < 25; ++i) {
    CheckCuda(cudaEventRecord(begin, stream), "event");
    CheckCuda(cudaGraphLaunch(replay, stream), "replay");
    CheckCuda(cudaEventRecord(end, stream), "event");
    CheckCuda(cudaEventSynchronize(end), "replay");
    float milliseconds = 0;
    CheckCuda(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (i >= 5) times.push_back(milliseconds * 1000.0 / launches);
  }
  std::sort(times.begin(), times.end());
  CheckCuda(cudaEventDestroy(begin), "event");
  CheckCuda(cudaEventDestroy(end), "event");
  CheckCuda(cudaGraphExecDestroy(replay), "graph");
  CheckCuda(cudaGraphDestroy(graph), "graph");
  CheckCuda(cudaStreamDestroy(stream), "stream");
  return {times[times.size() / 2], times.front(), times.back()};
}

double ReadBandwidth() {
  const int64_t bytes = int64_t{8} << 30;
  const DeviceArray<float> data = RandomFloats(bytes / 4, 1);
  const DeviceArray<uint32_t> sink(1);
  const Timing timing = TimeGraph(1, [&](int, cudaStream_t stream) {
    ReadAll<<<132 * 4, 512, 0, stream>>>(reinterpret_cast<const uint4*>(data.get()), bytes / 16,
                                         sink.get());
    return cudaGetLastError() == cudaSuccess ? absl::OkStatus()
                                             : absl::InternalError("ReadBandwidth");
  });
  return static_cast<double>(bytes) / timing.us * 1e-3;
}

}  // namespace moebius::bench
