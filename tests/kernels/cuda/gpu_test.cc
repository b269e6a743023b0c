#include "tests/kernels/cuda/gpu_test.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace moebius::kernels::cuda {
namespace {

constexpr size_t kGuard = 1024;
constexpr uint8_t kGuardByte = 0x5a;
constexpr uint8_t kPoisonByte = 0xcd;

bool HopperPresent() {
  // Kernels are loaded at start, not at their first launch, which would wait for a CompetingKernel.
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    cudaGetLastError();
    return false;
  }
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
         major == 9;
}

// Whether the environment asks for buffers of this kind.
bool BuffersAre(const char* kind) {
  const char* const value = std::getenv("MOEBIUS_TEST_BUFFERS");
  return value != nullptr && std::strcmp(value, kind) == 0;
}

// From the device's pool, which keeps what is freed: cudaFree waits for every running kernel, the
// CompetingKernel too, which then competes with nothing.
cudaError_t Allocate(uint8_t** memory, size_t bytes) {
  static const cudaError_t kept = [] {
    cudaMemPool_t pool;
    uint64_t everything = UINT64_MAX;
    cudaError_t error = cudaDeviceGetDefaultMemPool(&pool, 0);
    if (error == cudaSuccess)
      error = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &everything);
    // Room for what a test allocates beside a CompetingKernel: the pool's growth would wait too.
    void* room = nullptr;
    if (error == cudaSuccess) error = cudaMallocAsync(&room, size_t{1} << 30, nullptr);
    if (error == cudaSuccess) error = cudaFreeAsync(room, nullptr);
    return error;
  }();
  if (kept != cudaSuccess) return kept;
  return cudaMallocAsync(reinterpret_cast<void**>(memory), bytes, nullptr);
}

}  // namespace

void GpuTest::SetUp() {
  static const bool present = HopperPresent();
  if (!present) {
    GTEST_SKIP() << "NOT TESTED ON GPU: no CUDA device of compute capability 9.0 here; "
                    "kernels/cuda at " MOEBIUS_CUDA_HASH;
  }
}

void GpuTest::TearDown() {
  if (!IsSkipped()) ExpectCudaOk(cudaGetLastError(), "left over from the test");
}

void ExpectCudaOk(cudaError_t error, const char* what) {
  EXPECT_EQ(error, cudaSuccess) << what << ": " << cudaGetErrorString(error);
}

GuardedBytes::GuardedBytes(size_t bytes) : size_(bytes), padded_((bytes + 255) / 256 * 256) {
  if (BuffersAre("exact") || BuffersAre("bare")) {
    ExpectCudaOk(cudaMalloc(&data_, std::max<size_t>(size_, 1)), "allocation");
    Poison();
    return;
  }
  ExpectCudaOk(Allocate(&allocation_, padded_ + 2 * kGuard), "allocation");
  ExpectCudaOk(cudaMemset(allocation_, kGuardByte, padded_ + 2 * kGuard), "guards");
  data_ = allocation_ + kGuard;
  Poison();
}

void GuardedBytes::Poison() {
  if (!BuffersAre("bare")) ExpectCudaOk(cudaMemset(data_, kPoisonByte, size_), "poison");
}

GuardedBytes::~GuardedBytes() {
  if (allocation_ == nullptr) {
    ExpectCudaOk(cudaFree(data_), "free");
    return;
  }
  std::vector<uint8_t> all(padded_ + 2 * kGuard);
  ExpectCudaOk(cudaMemcpy(all.data(), allocation_, all.size(), cudaMemcpyDeviceToHost), "guards");
  size_t broken = 0, first = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    if (i >= kGuard && i < kGuard + size_) continue;
    if (all[i] != kGuardByte && broken++ == 0) first = i;
  }
  EXPECT_EQ(broken, 0u) << "writes outside of a buffer of " << size_
                        << " bytes, the first at offset "
                        << static_cast<int64_t>(first) - static_cast<int64_t>(kGuard);
  ExpectCudaOk(cudaFreeAsync(allocation_, nullptr), "free");
}

float NormalDraw(Prng& random) {
  const float radius = std::sqrt(-2.0f * std::log(1.0f - random.Unit()));
  return radius * std::cos(6.2831853f * random.Unit());
}

std::vector<float> RandomFloats(Prng& random, size_t count, float scale) {
  std::vector<float> values(count);
  for (float& v : values) v = NormalDraw(random) * scale;
  return values;
}

std::vector<Bf16> RandomBf16(Prng& random, size_t count, float scale) {
  std::vector<Bf16> values(count);
  for (Bf16& v : values) v = ToBf16(NormalDraw(random) * scale);
  return values;
}

std::vector<E4m3> RandomE4m3(Prng& random, size_t count, float scale) {
  std::vector<E4m3> values(count);
  for (E4m3& v : values) v = ToE4m3(NormalDraw(random) * scale);
  return values;
}

double RelativeDifference(const std::vector<float>& x, const std::vector<float>& y) {
  EXPECT_EQ(x.size(), y.size());
  double cross = 0, squares = 0;
  for (size_t i = 0; i < x.size() && i < y.size(); ++i) {
    cross += static_cast<double>(x[i]) * y[i];
    squares += static_cast<double>(x[i]) * x[i] + static_cast<double>(y[i]) * y[i];
  }
  return squares == 0 ? 0 : 1 - 2 * cross / squares;
}

double WorstElement(const std::vector<float>& x, const std::vector<float>& y) {
  EXPECT_EQ(x.size(), y.size());
  double squares = 0, worst = 0;
  for (const float v : y) squares += static_cast<double>(v) * v;
  const double usual = std::sqrt(squares / static_cast<double>(std::max<size_t>(y.size(), 1)));
  for (size_t i = 0; i < x.size() && i < y.size(); ++i) {
    const double difference = std::abs(static_cast<double>(x[i]) - y[i]);
    const double ratio = difference == 0 ? 0 : difference / (std::abs(y[i]) + usual);
    if (!(ratio <= worst)) worst = ratio;  // NaN stays
  }
  return worst;
}

cudaError_t LaunchCompetingKernel(int blocks, const volatile int* stop, volatile uint32_t* rounds,
                                  float* sink, cudaStream_t stream);

CompetingKernel::CompetingKernel() {
  ExpectCudaOk(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  ExpectCudaOk(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "stream");
  ExpectCudaOk(cudaMalloc(reinterpret_cast<void**>(&stop_), sizeof(int)), "order to stop");
  ExpectCudaOk(cudaMalloc(reinterpret_cast<void**>(&rounds_), kBlocks * sizeof(uint32_t)),
               "rounds");
  ExpectCudaOk(cudaMalloc(reinterpret_cast<void**>(&sink_), 1 << 20), "sink");
  ExpectCudaOk(cudaMemsetAsync(stop_, 0, sizeof(int), stream_), "order to stop");
  ExpectCudaOk(cudaMemsetAsync(rounds_, 0, kBlocks * sizeof(uint32_t), stream_), "rounds");
  ExpectCudaOk(cudaMemsetAsync(sink_, 0, 1 << 20, stream_), "sink");
  ExpectCudaOk(cudaStreamSynchronize(stream_), "competing kernel");
  ExpectCudaOk(LaunchCompetingKernel(kBlocks, stop_, rounds_, sink_, stream_), "competing kernel");
  EXPECT_TRUE(Runs()) << "the competing kernel does not start";
}

std::vector<uint32_t> CompetingKernel::Rounds() const {
  std::vector<uint32_t> rounds(kBlocks);
  ExpectCudaOk(cudaMemcpyAsync(rounds.data(), rounds_, kBlocks * sizeof(uint32_t),
                               cudaMemcpyDeviceToHost, side_),
               "rounds");
  ExpectCudaOk(cudaStreamSynchronize(side_), "rounds");
  return rounds;
}

bool CompetingKernel::Runs() const {
  const std::vector<uint32_t> before = Rounds();
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  while (std::chrono::steady_clock::now() < until) {
    const std::vector<uint32_t> now = Rounds();
    if (std::equal(before.begin(), before.end(), now.begin(), std::not_equal_to<>())) return true;
  }
  return false;
}

CompetingKernel::~CompetingKernel() {
  const int stop = 1;
  ExpectCudaOk(cudaMemcpyAsync(stop_, &stop, sizeof(stop), cudaMemcpyHostToDevice, side_),
               "order to stop");
  ExpectCudaOk(cudaStreamSynchronize(side_), "order to stop");
  ExpectCudaOk(cudaStreamSynchronize(stream_), "competing kernel");
  cudaFree(sink_);
  cudaFree(rounds_);
  cudaFree(stop_);
  cudaStreamDestroy(side_);
  cudaStreamDestroy(stream_);
}

}  // namespace moebius::kernels::cuda
