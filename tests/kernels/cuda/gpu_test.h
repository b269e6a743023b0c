#pragma once

// What tests of CUDA kernels share: a fixture that says so when there is no GPU, device buffers
// that notice writes outside of them, seeded inputs, hashes and the measure of agreement.

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "base/float_formats.h"
#include "base/hash.h"
#include "base/prng.h"

namespace moebius::kernels::cuda {

// Skips every test, with a reason that names the untested kernels, where no GPU of compute
// capability 9.0 is present. A CUDA error anywhere fails the test.
class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;
};

void ExpectCudaOk(cudaError_t error, const char* what);

// Device memory of `bytes` bytes between two guard zones. Fresh contents are poison (0xcd bytes: a
// huge negative number in every float type). Guards are checked at destruction. Under
// compute-sanitizer, which knows where an allocation ends, the environment variable
// MOEBIUS_TEST_BUFFERS asks for allocations without guards (`exact`), so that reads beyond are
// seen, and without poison (`bare`), so that reads of what nobody has written are.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t bytes);
  ~GuardedBytes();
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  void* data() const { return data_; }
  size_t size() const { return size_; }
  void Poison();

 private:
  uint8_t* allocation_ = nullptr;  // nullptr: data_ is all of it
  void* data_ = nullptr;
  size_t size_ = 0;
  size_t padded_ = 0;
};

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t count) : bytes_(count * sizeof(T)), count_(count) {}
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(host.size()) { Upload(host); }
  T* get() const { return static_cast<T*>(bytes_.data()); }
  size_t count() const { return count_; }
  void Poison() { bytes_.Poison(); }
  void Upload(const std::vector<T>& host) {
    ASSERT_LE(host.size(), count_);
    ExpectCudaOk(cudaMemcpy(get(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
                 "upload");
  }
  std::vector<T> Download() const {
    std::vector<T> host(count_);
    ExpectCudaOk(cudaMemcpy(host.data(), get(), count_ * sizeof(T), cudaMemcpyDeviceToHost),
                 "download");
    return host;
  }

 private:
  GuardedBytes bytes_;
  size_t count_;
};

// Mean 0, standard deviation 1 (Box-Muller); the same on every machine with the same libm.
float NormalDraw(Prng& random);

std::vector<Bf16> RandomBf16(Prng& random, size_t count, float scale = 1.0f);
std::vector<float> RandomFloats(Prng& random, size_t count, float scale = 1.0f);
// Codes of normally distributed values (standard deviation `scale`).
std::vector<E4m3> RandomE4m3(Prng& random, size_t count, float scale = 1.0f);

template <typename T>
uint64_t HashOf(const std::vector<T>& values) {
  return Hash64(values.data(), values.size() * sizeof(T));
}

// 1 - 2 sum(x y) / sum(x^2 + y^2) in double: 0 for equal vectors. NaN anywhere gives NaN.
double RelativeDifference(const std::vector<float>& x, const std::vector<float>& y);
// The largest |x - y| / (|y| + the root mean square of y): sees a single wrong element, which the
// measure above hides among many. NaN anywhere gives NaN.
double WorstElement(const std::vector<float>& x, const std::vector<float>& y);

// Keeps half of the multiprocessors partly busy on a stream of its own while it lives, so that a
// test sees other schedules than an idle GPU's. All its blocks run once it is constructed.
class CompetingKernel {
 public:
  CompetingKernel();
  ~CompetingKernel();
  // Whether all its blocks go on: then what was launched since its construction and has ended ran
  // beside it, neither after it nor before. Takes less than a millisecond if so.
  bool Runs() const;

 private:
  static constexpr int kBlocks = 66;
  std::vector<uint32_t> Rounds() const;

  cudaStream_t stream_ = nullptr;
  cudaStream_t side_ = nullptr;  // for the copies that steer and observe it
  int* stop_ = nullptr;
  uint32_t* rounds_ = nullptr;  // of each block
  float* sink_ = nullptr;
};

}  // namespace moebius::kernels::cuda

#define ASSERT_CUDA_OK(expression)                                \
  do {                                                            \
    const cudaError_t error_ = (expression);                      \
    ASSERT_EQ(error_, cudaSuccess) << cudaGetErrorString(error_); \
  } while (false)

#define ASSERT_STATUS_OK(expression)                 \
  do {                                               \
    const absl::Status status_ = (expression);       \
    ASSERT_TRUE(status_.ok()) << status_.ToString(); \
  } while (false)
