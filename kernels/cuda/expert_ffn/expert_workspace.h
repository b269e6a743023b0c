#pragma once

// What the grouped FFN keeps in device memory during a launch: the requantised SwiGLU outputs, with
// the counters by which the second product finds rows of the first complete, and the rows of wide
// tiles, gathered, with words by which the first product finds them there. rows_max * (intermediate
// + hidden * 128 / 81) * 33 / 32 bytes at most, and the counters.

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
  static absl::StatusOr<ExpertWorkspace> Create(int64_t rows_max, int64_t hidden,
                                                int64_t intermediate, int64_t experts_max);
  ExpertWorkspace(ExpertWorkspace&& other) noexcept;
  ExpertWorkspace& operator=(ExpertWorkspace&&) = delete;
  ~ExpertWorkspace();

  int64_t rows_max() const { return rows_max_; }
  int64_t hidden() const { return hidden_; }
  int64_t intermediate() const { return intermediate_; }
  int64_t experts_max() const { return experts_max_; }
  E4m3* codes() const { return codes_; }           // [rows_max, intermediate]
  float* scales() const { return scales_; }        // [rows_max, ceil(intermediate / 128)]
  int32_t* counters() const { return counters_; }  // kCounterTiles + one for each tile of rows
  // kTileRows for each tile of more than kNarrowRows rows that a launch can have.
  int64_t gathered_rows_max() const;
  E4m3* gathered_codes() const { return gathered_codes_; }  // [gathered_rows_max, hidden]
  // [gathered_rows_max / kTileRows, ceil(hidden / 128), kTileRows]: a block's scales side by side.
  float* gathered_scales() const { return gathered_scales_; }
  // [gathered_rows_max / kTileRows, kGatheredWords], zero between launches
  int32_t* gathered() const { return gathered_; }

 private:
  ExpertWorkspace(int64_t rows_max, int64_t hidden, int64_t intermediate, int64_t experts_max)
      : rows_max_(rows_max),
        hidden_(hidden),
        intermediate_(intermediate),
        experts_max_(experts_max) {}

  int64_t rows_max_;
  int64_t hidden_;
  int64_t intermediate_;
  int64_t experts_max_;
  E4m3* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* counters_ = nullptr;
  E4m3* gathered_codes_ = nullptr;
  float* gathered_scales_ = nullptr;
  int32_t* gathered_ = nullptr;  // behind the counters, in the same allocation
};

}  // namespace moebius::kernels::cuda
