#pragma once

// One safetensors file: header parser and memory-mapped reader.
//
// Layout: 8 bytes little-endian N, N bytes of JSON header, then the data buffer to the end of the
// file. The header maps tensor names to {dtype, shape, data_offsets relative to the buffer}. Files
// come from outside, so the header is checked completely before any of it is used: lengths with
// overflow checks, no duplicate keys, closed dtype list, sizes equal to shape times element size,
// and ranges that tile the buffer exactly, without holes or overlap, to the last byte.
//
// Data are not aligned to anything: check before casting to a typed pointer.

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/unique_handle.h"
#include "model/tensor_dtype.h"

namespace moebius::model {

struct TensorInfo {
  std::string name;
  TensorDType dtype = TensorDType::kF32;
  std::vector<int64_t> shape;  // every dimension >= 0; empty: a scalar
  uint64_t offset = 0;         // of the first byte, from the start of the file
  uint64_t bytes = 0;          // 0 if a dimension is 0
};

// "F32 [3, 4]", for messages.
std::string Describe(const TensorInfo& tensor);

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in the order of the data
  std::vector<std::pair<std::string, std::string>> metadata;
};

inline constexpr uint64_t kSafetensorsLengthBytes = 8;
inline constexpr uint64_t kSafetensorsMaxHeaderBytes = 100'000'000;

// N from the first 8 bytes (`prefix` may be shorter when the file is). `file_bytes` is the whole
// file's length.
absl::StatusOr<uint64_t> ParseSafetensorsLength(absl::Span<const std::byte> prefix,
                                                uint64_t file_bytes);

// The header of a file of `file_bytes`; `json` are exactly the N header bytes.
// Errors: INVALID_ARGUMENT naming tensor and field.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view json,
                                                         uint64_t file_bytes);

// An open file with a valid header. The descriptor is opened once and everything goes through it,
// so that a file replaced on disk cannot mix with the one that was checked. The first Bytes() of a
// tensor maps its pages and no others (and touches none): a process maps what it hosts. A file that
// is truncated by somebody while mapped raises SIGBUS on access, as any mapping does: keep models
// on storage nobody shortens.
// Const members may be called from any thread.
class SafetensorsFile {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  uint64_t file_bytes() const { return file_bytes_; }
  const SafetensorsHeader& header() const { return header_; }
  // nullptr if there is none of that name.
  const TensorInfo* Find(absl::string_view name) const;

  // The tensor's bytes in the mapping; valid while this object lives. `tensor` must come from this
  // file. Errors: the file changed its size since Open, or cannot be mapped.
  absl::StatusOr<absl::Span<const std::byte>> Bytes(const TensorInfo& tensor) const;

  // Advises the kernel that the tensor's pages are not needed for now. No effect on what Bytes
  // returns.
  void DontNeed(const TensorInfo& tensor) const;

 private:
  SafetensorsFile() = default;
  absl::Status Map(const TensorInfo& tensor) const;

  std::string path_;
  UniqueFd fd_;
  uint64_t file_bytes_ = 0;
  SafetensorsHeader header_;
  absl::flat_hash_map<absl::string_view, const TensorInfo*> by_name_;
  mutable std::mutex mutex_;
  // Address space for the whole file, in which tensors are mapped one by one: neighbours become one
  // mapping of the kernel's, so their number stays far below its limit. Guarded by mutex_.
  mutable std::byte* reserved_ = nullptr;
  mutable std::vector<bool> mapped_;  // by index in header_.tensors
};

}  // namespace moebius::model
