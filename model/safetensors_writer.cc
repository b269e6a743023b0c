#include "model/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "model/json_value.h"

namespace moebius::model {
namespace {

absl::StatusOr<uint64_t> SizeInBytes(const TensorSpec& tensor) {
  unsigned __int128 bits = static_cast<unsigned>(BitsOf(tensor.dtype));
  for (const int64_t dimension : tensor.shape) {
    if (dimension < 0) return absl::InvalidArgumentError("negative dimension");
    bits *= static_cast<unsigned __int128>(dimension);
    if (bits > static_cast<unsigned __int128>(std::numeric_limits<int64_t>::max())) {
      return absl::InvalidArgumentError("size overflows");
    }
  }
  if (bits % 8 != 0) return absl::InvalidArgumentError("elements fill no whole bytes");
  return static_cast<uint64_t>(bits / 8);
}

}  // namespace

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(
    const std::string& path, std::vector<TensorSpec> tensors,
    const std::vector<std::pair<std::string, std::string>>& metadata) {
  if (FileExists(path)) return absl::AlreadyExistsError(absl::StrCat(path, ": exists"));
  std::sort(tensors.begin(), tensors.end(), [](const TensorSpec& a, const TensorSpec& b) {
    const int a_bits = BitsOf(a.dtype), b_bits = BitsOf(b.dtype);
    return a_bits != b_bits ? a_bits > b_bits : a.name < b.name;
  });
  SafetensorsWriter writer;
  writer.path_ = path;
  JsonValue::Object header;
  if (!metadata.empty()) {
    JsonValue::Object members;
    for (const auto& [key, text] : metadata) members.emplace_back(key, JsonValue::OfString(text));
    header.emplace_back("__metadata__", JsonValue::OfObject(std::move(members)));
  }
  uint64_t begin = 0;
  for (TensorSpec& spec : tensors) {
    const absl::StatusOr<uint64_t> bytes = SizeInBytes(spec);
    if (!bytes.ok()) return Annotate(bytes.status(), absl::StrCat("tensor \"", spec.name, "\""));
    JsonValue::Array shape;
    for (const int64_t dimension : spec.shape) {
      shape.push_back(JsonValue::OfUint(static_cast<uint64_t>(dimension)));
    }
    JsonValue::Array offsets;
    offsets.push_back(JsonValue::OfUint(begin));
    offsets.push_back(JsonValue::OfUint(begin + *bytes));
    JsonValue::Object fields;
    fields.emplace_back("dtype", JsonValue::OfString(Name(spec.dtype)));
    fields.emplace_back("shape", JsonValue::OfArray(std::move(shape)));
    fields.emplace_back("data_offsets", JsonValue::OfArray(std::move(offsets)));
    header.emplace_back(spec.name, JsonValue::OfObject(std::move(fields)));
    writer.layout_.push_back(
        TensorInfo{std::move(spec.name), spec.dtype, std::move(spec.shape), begin, *bytes});
    begin += *bytes;
  }
  std::string json = WriteJson(JsonValue::OfObject(std::move(header)), -1);
  json.append((8 - json.size() % 8) % 8, ' ');
  // Our own reader is the judge of what may be written: it also finds duplicates.
  const absl::Status valid =
      ParseSafetensorsHeader(json, kSafetensorsLengthBytes + json.size() + begin).status();
  if (!valid.ok()) return Annotate(valid, path);
  for (TensorInfo& tensor : writer.layout_) tensor.offset += kSafetensorsLengthBytes + json.size();

  const std::string temporary = absl::StrCat(path, ".tmp.", ::getpid());
  writer.fd_.reset(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!writer.fd_) return ErrnoStatus(errno, temporary, "create");
  writer.temporary_ = temporary;
  std::byte length[kSafetensorsLengthBytes];
  for (size_t i = 0; i < kSafetensorsLengthBytes; ++i) {
    length[i] = static_cast<std::byte>(json.size() >> (8 * i));
  }
  RETURN_IF_ERROR(writer.Write(length));
  RETURN_IF_ERROR(writer.Write({reinterpret_cast<const std::byte*>(json.data()), json.size()}));
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ && !temporary_.empty()) ::unlink(temporary_.c_str());
}

absl::Status SafetensorsWriter::Write(absl::Span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd_.get(), bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return ErrnoStatus(errno, temporary_, "write");
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Append(absl::string_view name, absl::Span<const std::byte> bytes) {
  if (next_ >= layout_.size() || layout_[next_].name != name ||
      layout_[next_].bytes != bytes.size()) {
    return absl::FailedPreconditionError(absl::StrCat(
        path_, ": tensor \"", name, "\" of ", bytes.size(), " bytes is not next, expected ",
        next_ < layout_.size()
            ? absl::StrCat("\"", layout_[next_].name, "\" of ", layout_[next_].bytes, " bytes")
            : "none"));
  }
  RETURN_IF_ERROR(Write(bytes));
  ++next_;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  if (next_ != layout_.size()) {
    return absl::FailedPreconditionError(
        absl::StrCat(path_, ": tensor \"", layout_[next_].name, "\" was never written"));
  }
  if (::fsync(fd_.get()) != 0) return ErrnoStatus(errno, temporary_, "sync");
  // link() fails if the name has appeared meanwhile, where rename() would overwrite it.
  if (::link(temporary_.c_str(), path_.c_str()) != 0) return ErrnoStatus(errno, path_, "link");
  ::unlink(temporary_.c_str());
  temporary_.clear();
  fd_.reset();
  return absl::OkStatus();
}

}  // namespace moebius::model
