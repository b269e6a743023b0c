#include "model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "model/json_value.h"

namespace moebius::model {
namespace {

// Linear-time parsing also of hostile headers: everything that multiplies is capped.
constexpr size_t kMaxRank = 8;
constexpr size_t kMaxNameBytes = 1024;
constexpr size_t kMaxTensors = 1'000'000;
constexpr uint64_t kMaxDimension = uint64_t{1} << 48;

absl::Status Bad(absl::string_view where, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat("safetensors ", where, ": ", problem));
}

std::string Quote(absl::string_view name) {
  return absl::StrCat("tensor \"", name.substr(0, 200), "\"");
}

absl::Status ParseMetadata(const JsonValue& value, SafetensorsHeader& header) {
  const JsonValue::Object* members = value.AsObject();
  if (members == nullptr) return Bad("__metadata__", "is not an object");
  for (const auto& [key, text] : *members) {
    if (text.AsString() == nullptr) {
      return Bad(absl::StrCat("__metadata__.", key.substr(0, 200)),
                 absl::StrCat("is ", text.KindName(), ", expected a string"));
    }
    header.metadata.emplace_back(key, *text.AsString());
  }
  return absl::OkStatus();
}

// Bytes of a tensor; false on overflow or when the bits do not fill whole bytes.
bool CheckedBytes(const TensorInfo& tensor, uint64_t* bytes) {
  unsigned __int128 bits = static_cast<unsigned>(BitsOf(tensor.dtype));
  for (const int64_t dimension : tensor.shape) {
    // Dimensions are below 2^48, so one multiplication cannot overflow 128 bits.
    bits *= static_cast<unsigned __int128>(dimension);
    if (bits > std::numeric_limits<uint64_t>::max()) return false;
  }
  if (bits % 8 != 0) return false;
  *bytes = static_cast<uint64_t>(bits / 8);
  return true;
}

absl::StatusOr<TensorInfo> ParseTensor(const std::string& name, const JsonValue& value,
                                       uint64_t data_start) {
  const JsonValue::Object* members = value.AsObject();
  if (members == nullptr) return Bad(Quote(name), "is not an object");
  if (name.empty() || name.size() > kMaxNameBytes) {
    return Bad(Quote(name),
               absl::StrCat("name of ", name.size(), " bytes, expected 1 to ", kMaxNameBytes));
  }
  TensorInfo tensor;
  tensor.name = name;
  bool has_dtype = false, has_shape = false, has_offsets = false;
  uint64_t begin = 0, end = 0;
  for (const auto& [key, field] : *members) {
    if (key == "dtype") {
      const std::string* text = field.AsString();
      const auto dtype = text == nullptr ? std::nullopt : TensorDTypeFromName(*text);
      if (!dtype) {
        return Bad(Quote(name), absl::StrCat("dtype is ", text ? text->substr(0, 64) : "no string",
                                             ", not one of the format's types"));
      }
      tensor.dtype = *dtype;
      has_dtype = true;
    } else if (key == "shape") {
      const JsonValue::Array* dimensions = field.AsArray();
      if (dimensions == nullptr) return Bad(Quote(name), "shape is not an array");
      if (dimensions->size() > kMaxRank) {
        return Bad(Quote(name), absl::StrCat("shape has ", dimensions->size(),
                                             " dimensions, at most ", kMaxRank, " are read"));
      }
      for (const JsonValue& dimension : *dimensions) {
        const uint64_t* size = dimension.AsUint();
        if (size == nullptr || *size > kMaxDimension) {
          return Bad(Quote(name), "shape holds something other than a size below 2^48");
        }
        tensor.shape.push_back(static_cast<int64_t>(*size));
      }
      has_shape = true;
    } else if (key == "data_offsets") {
      const JsonValue::Array* offsets = field.AsArray();
      if (offsets == nullptr || offsets->size() != 2 || !(*offsets)[0].AsUint() ||
          !(*offsets)[1].AsUint()) {
        return Bad(Quote(name), "data_offsets is not a pair of unsigned integers");
      }
      begin = *(*offsets)[0].AsUint();
      end = *(*offsets)[1].AsUint();
      has_offsets = true;
    } else {
      return Bad(Quote(name), absl::StrCat("unknown field \"", key.substr(0, 64), "\""));
    }
  }
  if (!has_dtype) return Bad(Quote(name), "dtype is missing");
  if (!has_shape) return Bad(Quote(name), "shape is missing");
  if (!has_offsets) return Bad(Quote(name), "data_offsets is missing");
  if (end < begin) return Bad(Quote(name), "data_offsets end before they begin");
  uint64_t bytes = 0;
  if (!CheckedBytes(tensor, &bytes)) {
    return Bad(Quote(name), "shape times element size overflows or fills no whole bytes");
  }
  if (bytes != end - begin) {
    return Bad(Quote(name), absl::StrCat("data_offsets span ", end - begin, " bytes, but ",
                                         Describe(tensor), " takes ", bytes));
  }
  if (begin > std::numeric_limits<uint64_t>::max() - data_start) {
    return Bad(Quote(name), "data_offsets overflow");
  }
  tensor.offset = data_start + begin;
  tensor.bytes = bytes;
  return tensor;
}

// The tensor's place in the file, in whole pages: rounded outward, which takes in at most a
// neighbour's page on either side.
struct PageRange {
  uint64_t begin, bytes;
};
PageRange PagesOf(const TensorInfo& tensor) {
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t begin = tensor.offset / page * page;
  return {begin, tensor.offset + tensor.bytes - begin};
}

}  // namespace

std::string Describe(const TensorInfo& tensor) {
  return absl::StrCat(Name(tensor.dtype), " [", absl::StrJoin(tensor.shape, ", "), "]");
}

absl::StatusOr<uint64_t> ParseSafetensorsLength(absl::Span<const std::byte> prefix,
                                                uint64_t file_bytes) {
  if (prefix.size() < kSafetensorsLengthBytes || file_bytes < kSafetensorsLengthBytes) {
    return Bad("file", absl::StrCat(file_bytes, " bytes are too few for the length word"));
  }
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | std::to_integer<uint64_t>(prefix[i]);
  if (length > kSafetensorsMaxHeaderBytes) {
    return Bad("header length", absl::StrCat(length, " is above the format's limit of ",
                                             kSafetensorsMaxHeaderBytes));
  }
  if (length > file_bytes - kSafetensorsLengthBytes) {
    return Bad("header length",
               absl::StrCat(length, " reaches beyond the file's ", file_bytes, " bytes"));
  }
  return length;
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view json,
                                                         uint64_t file_bytes) {
  const uint64_t data_start = kSafetensorsLengthBytes + json.size();
  if (json.empty() || json[0] != '{') return Bad("header", "does not begin with '{'");
  // Writers pad with spaces; other white space after the object is not the format's.
  const size_t last = json.find_last_not_of(' ');
  if (json[last] != '}') return Bad("header", "something other than spaces follows the object");
  JsonLimits limits;
  limits.max_depth = 3;
  limits.max_values = 16'000'000;
  absl::StatusOr<JsonValue> root = ParseJson(json.substr(0, last + 1), limits);
  if (!root.ok()) return Annotate(root.status(), "safetensors header");

  SafetensorsHeader header;
  for (const auto& [name, value] : *root->AsObject()) {
    if (name == "__metadata__") {
      RETURN_IF_ERROR(ParseMetadata(value, header));
      continue;
    }
    if (header.tensors.size() >= kMaxTensors) {
      return Bad("header", absl::StrCat("more than ", kMaxTensors, " tensors"));
    }
    ASSIGN_OR_RETURN(TensorInfo tensor, ParseTensor(name, value, data_start));
    header.tensors.push_back(std::move(tensor));
  }
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) {
              return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
            });
  uint64_t expected = data_start;
  for (const TensorInfo& tensor : header.tensors) {
    if (tensor.offset != expected) {
      return Bad(Quote(tensor.name),
                 absl::StrCat("data_offsets leave a hole or overlap: begins at byte ",
                              tensor.offset - data_start, " of the data, expected ",
                              expected - data_start));
    }
    if (tensor.bytes > std::numeric_limits<uint64_t>::max() - expected) {
      return Bad(Quote(tensor.name), "data_offsets overflow");
    }
    expected += tensor.bytes;
  }
  if (expected != file_bytes) {
    return Bad("file",
               absl::StrCat("has ", file_bytes, " bytes, but its tensors end at ", expected));
  }
  return header;
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile());
  file->path_ = path;
  file->fd_.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file->fd_) return ErrnoStatus(errno, path, "open");
  struct stat info;
  if (::fstat(file->fd_.get(), &info) != 0) return ErrnoStatus(errno, path, "stat");
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  file->file_bytes_ = static_cast<uint64_t>(info.st_size);

  const auto read_at = [&](std::byte* out, uint64_t size, uint64_t offset) {
    while (size > 0) {
      const ssize_t got = ::pread(file->fd_.get(), out, size, static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return ErrnoStatus(errno, path, "read");
      if (got == 0) return absl::DataLossError(absl::StrCat(path, ": shrank while being read"));
      out += got;
      offset += static_cast<uint64_t>(got);
      size -= static_cast<uint64_t>(got);
    }
    return absl::OkStatus();
  };
  std::byte prefix[kSafetensorsLengthBytes] = {};
  const uint64_t prefix_bytes = std::min(file->file_bytes_, kSafetensorsLengthBytes);
  RETURN_IF_ERROR(read_at(prefix, prefix_bytes, 0));
  const absl::StatusOr<uint64_t> length =
      ParseSafetensorsLength({prefix, prefix_bytes}, file->file_bytes_);
  if (!length.ok()) return Annotate(length.status(), path);
  std::string json(*length, '\0');
  RETURN_IF_ERROR(
      read_at(reinterpret_cast<std::byte*>(json.data()), *length, kSafetensorsLengthBytes));
  absl::StatusOr<SafetensorsHeader> header = ParseSafetensorsHeader(json, file->file_bytes_);
  if (!header.ok()) return Annotate(header.status(), path);
  file->header_ = *std::move(header);
  for (const TensorInfo& tensor : file->header_.tensors) file->by_name_[tensor.name] = &tensor;
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (reserved_ != nullptr) ::munmap(reserved_, file_bytes_);
}

const TensorInfo* SafetensorsFile::Find(absl::string_view name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : it->second;
}

absl::Status SafetensorsFile::Map(const TensorInfo& tensor) const {
  const size_t index = static_cast<size_t>(&tensor - header_.tensors.data());
  CHECK_LT(index, header_.tensors.size());
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!mapped_.empty() && mapped_[index]) return absl::OkStatus();
  struct stat info;
  if (::fstat(fd_.get(), &info) != 0) return ErrnoStatus(errno, path_, "stat");
  if (static_cast<uint64_t>(info.st_size) != file_bytes_) {
    return absl::DataLossError(
        absl::StrCat(path_, ": changed its size from ", file_bytes_, " to ", info.st_size));
  }
  if (reserved_ == nullptr) {
    void* reserved =
        ::mmap(nullptr, file_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return ErrnoStatus(errno, path_, "reserve address space");
    reserved_ = static_cast<std::byte*>(reserved);
    mapped_.resize(header_.tensors.size());
  }
  if (tensor.bytes > 0) {
    const PageRange pages = PagesOf(tensor);
    if (::mmap(reserved_ + pages.begin, pages.bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd_.get(),
               static_cast<off_t>(pages.begin)) == MAP_FAILED) {
      return ErrnoStatus(errno, path_, "map");
    }
  }
  mapped_[index] = true;
  return absl::OkStatus();
}

absl::StatusOr<absl::Span<const std::byte>> SafetensorsFile::Bytes(const TensorInfo& tensor) const {
  CHECK(tensor.offset <= file_bytes_);
  CHECK(tensor.bytes <= file_bytes_ - tensor.offset);
  RETURN_IF_ERROR(Map(tensor));
  return absl::Span<const std::byte>(reserved_ + tensor.offset, tensor.bytes);
}

void SafetensorsFile::DontNeed(const TensorInfo& tensor) const {
  if (tensor.bytes == 0 || !Map(tensor).ok()) return;
  const PageRange pages = PagesOf(tensor);
  ::madvise(reserved_ + pages.begin, pages.bytes, MADV_DONTNEED);
}

}  // namespace moebius::model
