#pragma once

// Writes one safetensors file in a stream: names, dtypes and shapes are known first, the data
// follow tensor by tensor in the order of layout() (widest element type first, then by name, as the
// reference writer does), so memory is bounded by the largest tensor. The file appears under its
// name only when complete. One thread.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/unique_handle.h"
#include "model/safetensors.h"

namespace moebius::model {

struct TensorSpec {
  std::string name;
  TensorDType dtype = TensorDType::kF32;
  std::vector<int64_t> shape;
};

class SafetensorsWriter {
 public:
  // Refuses (ALREADY_EXISTS) a path that exists, and (INVALID_ARGUMENT) duplicate or reserved
  // names. Nothing is at `path` until Finish; a writer destroyed before that leaves nothing behind.
  static absl::StatusOr<SafetensorsWriter> Create(
      const std::string& path, std::vector<TensorSpec> tensors,
      const std::vector<std::pair<std::string, std::string>>& metadata = {});
  ~SafetensorsWriter();
  SafetensorsWriter(SafetensorsWriter&&) = default;
  SafetensorsWriter& operator=(SafetensorsWriter&&) = delete;

  // The order in which Append expects the tensors; offsets are those in the file.
  absl::Span<const TensorInfo> layout() const { return layout_; }

  // All bytes of the next tensor in layout(). Errors: wrong name or size, or the disk's.
  absl::Status Append(absl::string_view name, absl::Span<const std::byte> bytes);

  // After the last tensor: syncs and gives the file its name.
  absl::Status Finish();

 private:
  SafetensorsWriter() = default;
  absl::Status Write(absl::Span<const std::byte> bytes);

  std::string path_;
  std::string temporary_;  // empty once finished
  UniqueFd fd_;
  std::vector<TensorInfo> layout_;
  size_t next_ = 0;
};

}  // namespace moebius::model
