#pragma once

// A kernel that stands in front of another: it lets that one start as early as it may, and writes
// or reads late what that one reads or writes.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {

// Copies `bytes` after about 100 microseconds, one block.
void LaunchSlowCopy(void* to, const void* from, size_t bytes, cudaStream_t stream);

// Zeros in an input whose contents a kernel in front of what is launched next, on the default
// stream, brings back late. Lives until that has ended.
class LateInput {
 public:
  LateInput(void* input, size_t bytes);

 private:
  DeviceBuffer<uint8_t> contents_;
};

// Fills memory and has it read late, by a kernel in front of what is launched next, on the default
// stream: what that overwrites may not change before.
class LateReader {
 public:
  LateReader(void* memory, size_t bytes);
  // Whether the late kernel found nothing but the filling. Waits for it.
  bool FoundTheFilling() const;

 private:
  DeviceBuffer<uint8_t> found_;
};

}  // namespace moebius::kernels::cuda
