#pragma once

// What the grouped FFN keeps between its two products: the requantised SwiGLU outputs, and the
// counters by which the second finds rows of the first complete.

#include <cstdint>

#include "absl/status/statusor.h"
#include "base/float_formats.h"

namespace moebius::kernels::cuda {

// Owns device memory. Move-only; any thread, but launches that share one must be ordered on one
// stream: every launch expects the counters at zero and leaves them so.
class ExpertWorkspace {
 public:
  // For launches of up to rows_max rows and experts_max experts. Errors: INVALID_ARGUMENT,
  // RESOURCE_EXHAUSTED.
  static absl::StatusOr<ExpertWorkspace> Create(int64_t rows_max, int64_t intermediate,
                                                int64_t experts_max);
  ExpertWorkspace(ExpertWorkspace&& other) noexcept;
  ExpertWorkspace& operator=(ExpertWorkspace&&) = delete;
  ~ExpertWorkspace();

  int64_t rows_max() const { return rows_max_; }
  int64_t intermediate() const { return intermediate_; }
  int64_t experts_max() const { return experts_max_; }
  E4m3* codes() const { return codes_; }           // [rows_max, intermediate]
  float* scales() const { return scales_; }        // [rows_max, ceil(intermediate / 128)]
  int32_t* counters() const { return counters_; }  // kCounterTiles + one for each tile of rows

 private:
  ExpertWorkspace(int64_t rows_max, int64_t intermediate, int64_t experts_max)
      : rows_max_(rows_max), intermediate_(intermediate), experts_max_(experts_max) {}

  int64_t rows_max_;
  int64_t intermediate_;
  int64_t experts_max_;
  E4m3* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* counters_ = nullptr;
};

}  // namespace moebius::kernels::cuda
