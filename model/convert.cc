#include "model/convert.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "base/tensor_view.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/file_io.h"
#include "model/json_value.h"
#include "model/quantize.h"
#include "model/safetensors_writer.h"

namespace moebius::model {
namespace {

constexpr char kScaleSuffix[] = "_scale_inv";
constexpr uint64_t kMaxCopiedBytes = 256 << 20;
constexpr const char* kCopiedFiles[] = {"tokenizer.json",          "tokenizer_config.json",
                                        "special_tokens_map.json", "chat_template.jinja",
                                        "generation_config.json",  "LICENSE"};

absl::Status FileSystemStatus(const std::error_code& error, const std::string& path,
                              const char* what) {
  return ErrnoStatus(error.value(), path, what);
}

// One tensor of the output and where its numbers come from.
struct Job {
  enum class Kind { kCopy, kDequantize, kRound, kQuantizeCodes, kQuantizeScales };
  Kind kind = Kind::kCopy;
  Checkpoint::Entry source;
  TensorSpec spec;
  uint64_t bytes = 0;
};

uint64_t BytesOf(const TensorSpec& spec) {
  uint64_t bytes = static_cast<uint64_t>(BitsOf(spec.dtype)) / 8;
  for (const int64_t dimension : spec.shape) bytes *= static_cast<uint64_t>(dimension);
  return bytes;
}

absl::Status Bad(const Checkpoint::Entry& entry, absl::string_view problem) {
  return absl::InvalidArgumentError(
      absl::StrCat(entry.file->path(), ": tensor \"", entry.info->name, "\": ", problem));
}

class Converter {
 public:
  Converter(const Checkpoint& checkpoint, const ConvertOptions& options, std::string out_dir)
      : checkpoint_(checkpoint), options_(options), out_dir_(std::move(out_dir)) {}

  absl::Status Run() {
    for (const Checkpoint::Entry& entry : checkpoint_.entries()) RETURN_IF_ERROR(Plan(entry));
    std::vector<std::vector<Job>> shards(1);
    uint64_t shard_bytes = 0;
    for (Job& job : jobs_) {
      if (!shards.back().empty() && shard_bytes + job.bytes > options_.max_shard_bytes) {
        shards.emplace_back();
        shard_bytes = 0;
      }
      shard_bytes += job.bytes;
      total_bytes_ += job.bytes;
      shards.back().push_back(std::move(job));
    }
    if (shards.size() == 1) return WriteShard(shards[0], kSingleFileName);
    JsonValue::Object weight_map;
    for (size_t i = 0; i < shards.size(); ++i) {
      const std::string name =
          absl::StrFormat("model-%05d-of-%06d.safetensors", i + 1, shards.size());
      for (const Job& job : shards[i]) {
        weight_map.emplace_back(job.spec.name, JsonValue::OfString(name));
      }
      RETURN_IF_ERROR(WriteShard(shards[i], name));
    }
    JsonValue::Object metadata;
    metadata.emplace_back("total_size", JsonValue::OfUint(total_bytes_));
    JsonValue::Object index;
    index.emplace_back("metadata", JsonValue::OfObject(std::move(metadata)));
    index.emplace_back("weight_map", JsonValue::OfObject(std::move(weight_map)));
    return ReplaceFile(absl::StrCat(out_dir_, "/", kIndexFileName),
                       WriteJson(JsonValue::OfObject(std::move(index)), 2));
  }

 private:
  void Add(Job::Kind kind, const Checkpoint::Entry& source, TensorSpec spec) {
    const uint64_t bytes = BytesOf(spec);
    jobs_.push_back({kind, source, std::move(spec), bytes});
  }

  absl::Status Plan(const Checkpoint::Entry& entry) {
    const TensorInfo& info = *entry.info;
    const TensorSpec same{info.name, info.dtype, info.shape};
    if (options_.target == ConvertTarget::kBf16) {
      if (info.dtype == TensorDType::kF8E4m3) {
        RETURN_IF_ERROR(CheckScale(entry));
        Add(Job::Kind::kDequantize, entry, {info.name, TensorDType::kBf16, info.shape});
        return absl::OkStatus();
      }
      const std::string weight(absl::StripSuffix(info.name, kScaleSuffix));
      if (weight != info.name) {
        const Checkpoint::Entry scaled = checkpoint_.Find(weight);
        if (scaled.file != nullptr && scaled.info->dtype == TensorDType::kF8E4m3) {
          return absl::OkStatus();  // spent by its weight
        }
        return Bad(entry, "has no F8_E4M3 weight");
      }
      if (info.dtype == TensorDType::kF32 && info.shape.size() == 2) {
        Add(Job::Kind::kRound, entry, {info.name, TensorDType::kBf16, info.shape});
        return absl::OkStatus();
      }
    } else if (IsQuantizedName(info.name)) {
      if ((info.dtype != TensorDType::kBf16 && info.dtype != TensorDType::kF32) ||
          info.shape.size() != 2 || info.bytes == 0) {
        return Bad(entry, absl::StrCat("is ", Describe(info), ", expected a BF16 or F32 matrix"));
      }
      Add(Job::Kind::kQuantizeCodes, entry, {info.name, TensorDType::kF8E4m3, info.shape});
      Add(Job::Kind::kQuantizeScales, entry,
          {info.name + kScaleSuffix,
           TensorDType::kF32,
           {CeilDiv(info.shape[0], kQuantBlock), CeilDiv(info.shape[1], kQuantBlock)}});
      return absl::OkStatus();
    }
    Add(Job::Kind::kCopy, entry, same);
    return absl::OkStatus();
  }

  absl::Status CheckScale(const Checkpoint::Entry& entry) const {
    const Checkpoint::Entry scale = checkpoint_.Find(entry.info->name + kScaleSuffix);
    if (scale.file == nullptr) return Bad(entry, "has no _scale_inv");
    const std::vector<int64_t>& shape = entry.info->shape;
    if (shape.size() != 2) return Bad(entry, "F8_E4M3, but not a matrix");
    const std::vector<int64_t> blocks = {CeilDiv(shape[0], kQuantBlock),
                                         CeilDiv(shape[1], kQuantBlock)};
    if (scale.info->dtype != TensorDType::kF32 || scale.info->shape != blocks) {
      return Bad(scale, absl::StrCat("is ", Describe(*scale.info), ", expected F32 [", blocks[0],
                                     ", ", blocks[1], "]"));
    }
    return absl::OkStatus();
  }

  absl::Status WriteShard(const std::vector<Job>& jobs, const std::string& name) {
    std::vector<TensorSpec> specs;
    absl::flat_hash_map<absl::string_view, const Job*> by_name;
    for (const Job& job : jobs) {
      specs.push_back(job.spec);
      by_name[job.spec.name] = &job;
    }
    ASSIGN_OR_RETURN(SafetensorsWriter writer,
                     SafetensorsWriter::Create(absl::StrCat(out_dir_, "/", name), std::move(specs),
                                               {{"format", "pt"}}));
    for (const TensorInfo& info : writer.layout()) {
      RETURN_IF_ERROR(WriteTensor(*by_name.at(info.name), writer));
      done_bytes_ += info.bytes;
      if (options_.progress) options_.progress(done_bytes_, total_bytes_);
    }
    return writer.Finish();
  }

  absl::Status WriteTensor(const Job& job, SafetensorsWriter& writer) {
    const auto as_bytes = [](const auto& values) {
      return absl::Span<const std::byte>(reinterpret_cast<const std::byte*>(values.data()),
                                         values.size() * sizeof(values[0]));
    };
    const TensorInfo& source = *job.source.info;
    ASSIGN_OR_RETURN(const absl::Span<const std::byte> bytes, job.source.file->Bytes(source));
    absl::Status status;
    switch (job.kind) {
      case Job::Kind::kCopy:
        status = writer.Append(job.spec.name, bytes);
        break;
      case Job::Kind::kDequantize: {
        ASSIGN_OR_RETURN(const absl::Span<const std::byte> scales,
                         checkpoint_.Bytes(source.name + kScaleSuffix));
        status = writer.Append(
            job.spec.name,
            as_bytes(DequantizeMatrix(bytes, scales, source.shape[0], source.shape[1])));
        break;
      }
      case Job::Kind::kRound: {
        std::vector<Bf16> rounded(bytes.size() / sizeof(float));
        for (size_t i = 0; i < rounded.size(); ++i) {
          float value;
          std::memcpy(&value, bytes.data() + i * sizeof(float), sizeof(float));
          rounded[i] = ToBf16(value);
        }
        status = writer.Append(job.spec.name, as_bytes(rounded));
        break;
      }
      // Codes and scales stand far apart in the file (widest type first), so a matrix is quantised
      // twice rather than all scales of a shard kept.
      case Job::Kind::kQuantizeCodes:
      case Job::Kind::kQuantizeScales: {
        const absl::Status quantized = QuantizeMatrix(*ToDType(source.dtype), bytes,
                                                      source.shape[0], source.shape[1], matrix_);
        if (!quantized.ok()) return Bad(job.source, quantized.message());
        status = writer.Append(job.spec.name, job.kind == Job::Kind::kQuantizeCodes
                                                  ? as_bytes(matrix_.codes)
                                                  : as_bytes(matrix_.scales));
        break;
      }
    }
    job.source.file->DontNeed(source);
    return status;
  }

  const Checkpoint& checkpoint_;
  const ConvertOptions& options_;
  const std::string out_dir_;
  std::vector<Job> jobs_;
  QuantizedMatrix matrix_;  // reused between tensors
  uint64_t done_bytes_ = 0;
  uint64_t total_bytes_ = 0;
};

// config.json with quantization_config as the target has it; everything else as it was.
absl::Status WriteConfig(const std::string& in_dir, const std::string& out_dir,
                         ConvertTarget target) {
  ASSIGN_OR_RETURN(const std::string text,
                   ReadSmallFile(absl::StrCat(in_dir, "/config.json"), kMaxCopiedBytes));
  ASSIGN_OR_RETURN(JsonValue config, ParseJson(text));
  JsonValue::Object& fields = *config.AsObject();
  for (auto it = fields.begin(); it != fields.end();) {
    it = it->first == "quantization_config" ? fields.erase(it) : it + 1;
  }
  if (target == ConvertTarget::kFp8) {
    JsonValue::Array block;
    block.push_back(JsonValue::OfUint(kQuantBlock));
    block.push_back(JsonValue::OfUint(kQuantBlock));
    JsonValue::Object quantization;
    quantization.emplace_back("activation_scheme", JsonValue::OfString("dynamic"));
    quantization.emplace_back("fmt", JsonValue::OfString("e4m3"));
    quantization.emplace_back("quant_method", JsonValue::OfString("fp8"));
    quantization.emplace_back("weight_block_size", JsonValue::OfArray(std::move(block)));
    fields.emplace_back("quantization_config", JsonValue::OfObject(std::move(quantization)));
  }
  for (auto& [name, value] : fields) {
    if (name == "torch_dtype" || name == "dtype") value = JsonValue::OfString("bfloat16");
  }
  return ReplaceFile(absl::StrCat(out_dir, "/config.json"), WriteJson(config, 2) + "\n");
}

absl::Status CopyFiles(const std::string& in_dir, const std::string& out_dir) {
  for (const char* name : kCopiedFiles) {
    const std::string from = absl::StrCat(in_dir, "/", name);
    if (!FileExists(from)) continue;
    ASSIGN_OR_RETURN(const std::string content, ReadSmallFile(from, kMaxCopiedBytes));
    RETURN_IF_ERROR(ReplaceFile(absl::StrCat(out_dir, "/", name), content));
  }
  return absl::OkStatus();
}

bool HoldsF32Matrices(const Checkpoint& checkpoint) {
  const auto& entries = checkpoint.entries();
  return std::any_of(entries.begin(), entries.end(), [](const Checkpoint::Entry& entry) {
    return entry.info->dtype == TensorDType::kF32 && entry.info->shape.size() == 2;
  });
}

absl::Status ConvertInto(const std::string& in_dir, const std::string& work_dir,
                         const ConvertOptions& options) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadConfig(in_dir));
  ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(in_dir));
  const bool is_fp8 = config.quantization.has_value();
  const bool done =
      options.target == ConvertTarget::kFp8 ? is_fp8 : !is_fp8 && !HoldsF32Matrices(*checkpoint);
  if (done) {
    return absl::FailedPreconditionError(
        absl::StrCat(in_dir, ": is ", is_fp8 ? "an FP8" : "a BF16", " checkpoint already"));
  }
  RETURN_IF_ERROR(Converter(*checkpoint, options, work_dir).Run());
  RETURN_IF_ERROR(CopyFiles(in_dir, work_dir));
  RETURN_IF_ERROR(WriteConfig(in_dir, work_dir, options.target));
  // Our own readers are the judges before anybody sees the result.
  RETURN_IF_ERROR(LoadConfig(work_dir).status());
  return Checkpoint::Open(work_dir).status();
}

}  // namespace

bool IsQuantizedName(absl::string_view tensor_name) {
  if (!absl::ConsumeSuffix(&tensor_name, ".weight")) return false;
  const size_t dot = tensor_name.rfind('.');
  if (dot == absl::string_view::npos) return false;
  const absl::string_view last = tensor_name.substr(dot + 1);
  for (const absl::string_view name :
       {"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}) {
    if (last == name) return absl::EndsWith(tensor_name.substr(0, dot), ".self_attn");
  }
  return last == "gate_proj" || last == "up_proj" || last == "down_proj";
}

absl::Status ConvertModel(const std::string& in_dir, const std::string& out_dir,
                          const ConvertOptions& options) {
  std::error_code error;
  if (FileExists(out_dir) && !std::filesystem::is_empty(out_dir, error)) {
    return absl::AlreadyExistsError(
        absl::StrCat(out_dir, ": exists and is not an empty directory"));
  }
  // Beside the result, so that the final rename stays within one file system.
  std::string base = out_dir;
  while (base.size() > 1 && base.back() == '/') base.pop_back();
  const std::string work_dir = absl::StrCat(base, ".tmp.", ::getpid());
  if (!std::filesystem::create_directory(work_dir, error)) {
    if (!error) return absl::AlreadyExistsError(absl::StrCat(work_dir, ": exists"));
    return FileSystemStatus(error, work_dir, "create directory");
  }
  absl::Status status = ConvertInto(in_dir, work_dir, options);
  if (status.ok() && std::rename(work_dir.c_str(), base.c_str()) != 0) {
    status = ErrnoStatus(errno, base, "rename");
  }
  if (!status.ok()) std::filesystem::remove_all(work_dir, error);
  return status;
}

}  // namespace moebius::model
