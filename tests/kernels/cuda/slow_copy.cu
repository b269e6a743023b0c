#include "tests/kernels/cuda/slow_copy.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace moebius::kernels::cuda {
namespace {

constexpr uint8_t kFilling = 0xcd;  // as in a fresh DeviceBuffer

__global__ void SlowCopy(uint8_t* to, const uint8_t* from, size_t bytes) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const long long began = clock64();
  while (clock64() - began < 180'000) {
  }
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
}

}  // namespace

void LaunchSlowCopy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  SlowCopy<<<1, 1024, 0, stream>>>(static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from),
                                   bytes);
}

LateInput::LateInput(void* input, size_t bytes) : contents_(bytes) {
  ExpectCudaOk(cudaMemcpy(contents_.get(), input, bytes, cudaMemcpyDeviceToDevice), "input");
  ExpectCudaOk(cudaMemset(input, 0, bytes), "input");
  ExpectCudaOk(cudaDeviceSynchronize(), "input");
  LaunchSlowCopy(input, contents_.get(), bytes, nullptr);
}

LateReader::LateReader(void* memory, size_t bytes) : found_(bytes) {
  ExpectCudaOk(cudaMemset(memory, kFilling, bytes), "memory");
  ExpectCudaOk(cudaDeviceSynchronize(), "memory");
  LaunchSlowCopy(found_.get(), memory, bytes, nullptr);
}
bool LateReader::FoundTheFilling() const {
  const std::vector<uint8_t> found = found_.Download();
  return std::all_of(found.begin(), found.end(), [](uint8_t byte) { return byte == kFilling; });
}

}  // namespace moebius::kernels::cuda
