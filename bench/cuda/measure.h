#pragma once

// Timing of CUDA kernels: graphs of launches over inputs that together exceed L2, medians of
// replays, and random device data. A benchmark that cannot run is fatal: CheckCuda and CheckOk
// print why and exit.

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "base/float_formats.h"

namespace moebius::bench {

void CheckCuda(cudaError_t error, const char* what);
void CheckOk(const absl::Status& status);

// Owned device memory, uninitialised unless one of Fill... is called.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(int64_t count) : count_(count) {
    CheckCuda(cudaMalloc(reinterpret_cast<void**>(&data_), Bytes()), "cudaMalloc");
  }
  DeviceArray(DeviceArray&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
  }
  DeviceArray& operator=(DeviceArray&&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* get() const { return data_; }
  int64_t count() const { return count_; }
  size_t Bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  void Upload(const T* host) {
    CheckCuda(cudaMemcpy(data_, host, Bytes(), cudaMemcpyHostToDevice), "upload");
  }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

// Random contents, a function of the seed and the index: about normal with the given deviation.
DeviceArray<Bf16> RandomBf16(int64_t count, uint64_t seed, float scale = 1.0f);
DeviceArray<float> RandomFloats(int64_t count, uint64_t seed, float scale = 1.0f);
// Finite codes with the exponents of a normal weight matrix.
DeviceArray<E4m3> RandomE4m3(int64_t count, uint64_t seed);
// Positive scales around `scale`.
DeviceArray<float> RandomScales(int64_t count, uint64_t seed, float scale);

// How many copies of an input of `bytes` to rotate through, so that L2 holds none of the next.
int CopiesPastL2(int64_t bytes);

struct Timing {
  double us = 0;  // one launch, median over replays
  double us_min = 0;
  double us_max = 0;
};

// Captures launch(0) .. launch(launches - 1) in one graph and replays it 5 + 20 times.
Timing TimeGraph(int launches, const std::function<absl::Status(int, cudaStream_t)>& launch);

// GB/s of a kernel that reads 8 GB and writes almost nothing: what floors are computed from.
double ReadBandwidth();

}  // namespace moebius::bench
