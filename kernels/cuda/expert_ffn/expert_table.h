#pragma once

// The routed experts of a worker as the grouped FFN finds them: weights where the checkpoint's
// loader put them in device memory, and, once for each expert, how the copy engine reads them.

#include <cuda.h>

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

// Device pointers to one expert, borrowed. Matrices are dense and 16-aligned; scales are those of
// 128x128 blocks, [ceil(rows / 128), ceil(cols / 128)].
struct ExpertMatrices {
  const E4m3* gate_proj = nullptr;  // [intermediate, hidden]
  const E4m3* up_proj = nullptr;    // [intermediate, hidden]
  const E4m3* down_proj = nullptr;  // [hidden, intermediate]
  const float* gate_scales = nullptr;
  const float* up_scales = nullptr;
  const float* down_scales = nullptr;
};

// What kernels read. Tensor maps in device memory must be 64-aligned.
struct alignas(128) ExpertEntry {
  CUtensorMap gate, up, down;
  const float* gate_scales;
  const float* up_scales;
  const float* down_scales;
};

// Owns an array of entries in device memory, fixed at creation. Move-only; any thread. The matrices
// must outlive it, and it the launches that use it.
class ExpertTable {
 public:
  // Encodes and uploads, synchronously: for load time, not for steps. Errors: INVALID_ARGUMENT
  // naming the expert and field; RESOURCE_EXHAUSTED; UNAVAILABLE without a driver.
  static absl::StatusOr<ExpertTable> Create(int64_t hidden, int64_t intermediate,
                                            absl::Span<const ExpertMatrices> experts);
  ExpertTable(ExpertTable&& other) noexcept;
  ExpertTable& operator=(ExpertTable&&) = delete;
  ~ExpertTable();

  int64_t hidden() const { return hidden_; }
  int64_t intermediate() const { return intermediate_; }
  int64_t size() const { return size_; }
  const ExpertEntry* entries() const { return entries_; }  // device memory, [size]

 private:
  ExpertTable(int64_t hidden, int64_t intermediate, int64_t size)
      : hidden_(hidden), intermediate_(intermediate), size_(size) {}

  int64_t hidden_;
  int64_t intermediate_;
  int64_t size_;
  ExpertEntry* entries_ = nullptr;
};

}  // namespace moebius::kernels::cuda
