#include "model/manifest.h"

#include <sys/stat.h>

#include <bit>
#include <charconv>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "model/json_value.h"

namespace moebius::model {
namespace {

constexpr char kFormat[] = "moebius-manifest-1";
constexpr uint64_t kMaxManifestBytes = 512 << 20;
constexpr size_t kMaxRank = 8;

absl::Status Bad(absl::string_view field, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat("manifest field ", field, ": ", problem));
}

// Doubles enter the digest by their bits, so that no formatting can merge two different values.
std::string Bits(double value) { return absl::StrFormat("%016x", std::bit_cast<uint64_t>(value)); }

absl::StatusOr<Hash128Value> HashField(const JsonValue& object, absl::string_view key,
                                       absl::string_view where) {
  const JsonValue* value = object.Find(key);
  Hash128Value hash;
  if (value == nullptr || value->AsString() == nullptr || !FromHex(*value->AsString(), &hash)) {
    return Bad(absl::StrCat(where, key), "expected 32 hexadecimal digits");
  }
  return hash;
}

absl::StatusOr<ManifestTensor> ParseManifestTensor(const std::string& name,
                                                   const JsonValue& value) {
  const std::string where = absl::StrCat("tensors.\"", name.substr(0, 200), "\".");
  if (value.AsObject() == nullptr) return Bad(where, "expected an object");
  ManifestTensor tensor;
  const JsonValue* dtype = value.Find("dtype");
  const auto parsed = dtype == nullptr || dtype->AsString() == nullptr
                          ? std::nullopt
                          : TensorDTypeFromName(*dtype->AsString());
  if (!parsed) return Bad(where + "dtype", "not one of the format's types");
  tensor.dtype = *parsed;
  const JsonValue* shape = value.Find("shape");
  if (shape == nullptr || shape->AsArray() == nullptr || shape->AsArray()->size() > kMaxRank) {
    return Bad(where + "shape", "expected an array of sizes");
  }
  for (const JsonValue& dimension : *shape->AsArray()) {
    const uint64_t* size = dimension.AsUint();
    if (size == nullptr || *size > uint64_t{1} << 48) {
      return Bad(where + "shape", "expected an array of sizes");
    }
    tensor.shape.push_back(static_cast<int64_t>(*size));
  }
  ASSIGN_OR_RETURN(tensor.xxh3_128, HashField(value, "xxh3_128", where));
  return tensor;
}

// Does the manifest describe these files? Bytes are not read.
absl::Status CheckFits(const Manifest& manifest, const Checkpoint& checkpoint,
                       const ModelConfig& config) {
  const char* advice = " (delete the manifest if the model was changed on purpose)";
  if (manifest.config != HashOfConfig(config)) {
    return absl::FailedPreconditionError(
        absl::StrCat("config.json is not the one this manifest was made for", advice));
  }
  for (const Checkpoint::Entry& entry : checkpoint.entries()) {
    const auto it = manifest.tensors.find(entry.info->name);
    if (it == manifest.tensors.end() || it->second.dtype != entry.info->dtype ||
        it->second.shape != entry.info->shape) {
      return absl::FailedPreconditionError(absl::StrCat(
          "tensor \"", entry.info->name, "\" of ", entry.file->path(),
          it == manifest.tensors.end() ? " is not listed" : " has another dtype or shape", advice));
    }
  }
  if (manifest.tensors.size() != checkpoint.entries().size()) {
    return absl::FailedPreconditionError(absl::StrCat("lists ", manifest.tensors.size(),
                                                      " tensors, the checkpoint has ",
                                                      checkpoint.entries().size(), advice));
  }
  return absl::OkStatus();
}

absl::StatusOr<Manifest> LoadManifest(const std::string& path, const Checkpoint& checkpoint,
                                      const ModelConfig& config) {
  ASSIGN_OR_RETURN(const std::string json, ReadSmallFile(path, kMaxManifestBytes));
  absl::StatusOr<Manifest> manifest = ParseManifest(json);
  const absl::Status status =
      manifest.ok() ? CheckFits(*manifest, checkpoint, config) : manifest.status();
  if (!status.ok()) return Annotate(status, path);
  return manifest;
}

std::string CachePath(const Checkpoint& checkpoint, const std::string& cache_dir) {
  // By the directory's real path: two models of one base name must not meet.
  char* resolved = ::realpath(checkpoint.dir().c_str(), nullptr);
  const std::string real = resolved != nullptr ? resolved : checkpoint.dir();
  std::free(resolved);
  return absl::StrCat(cache_dir, "/", ToHex(Hash128(real.data(), real.size())), ".manifest.json");
}

Hash128Value HashTensor(absl::Span<const std::byte> bytes) {
  return Hash128(bytes.data(), bytes.size());
}

}  // namespace

std::string ToHex(const Hash128Value& hash) {
  return absl::StrFormat("%016x%016x", hash.high, hash.low);
}

bool FromHex(absl::string_view text, Hash128Value* hash) {
  if (text.size() != 32) return false;
  const auto half = [](absl::string_view digits, uint64_t* out) {
    const auto result = std::from_chars(digits.data(), digits.data() + 16, *out, 16);
    return result.ec == std::errc() && result.ptr == digits.data() + 16;
  };
  return half(text.substr(0, 16), &hash->high) && half(text.substr(16), &hash->low);
}

Hash128Value HashOfConfig(const ModelConfig& c) {
  std::string text = absl::StrCat(
      Name(c.model_type), ",", c.vocab_size, ",", c.hidden_size, ",", c.num_hidden_layers, ",",
      c.num_nextn_predict_layers, ",", c.max_position_embeddings, ",", Bits(c.rms_norm_eps), ",",
      c.num_attention_heads, ",", c.q_lora_rank.value_or(0), ",", c.kv_lora_rank, ",",
      c.qk_nope_head_dim, ",", c.qk_rope_head_dim, ",", c.v_head_dim, ",", Bits(c.rope_theta));
  if (c.rope_scaling) {
    const YarnScaling& y = *c.rope_scaling;
    absl::StrAppend(&text, ",yarn,", Bits(y.factor), ",", y.original_max_position_embeddings, ",",
                    Bits(y.beta_fast), ",", Bits(y.beta_slow), ",", Bits(y.mscale), ",",
                    Bits(y.mscale_all_dim));
  }
  absl::StrAppend(&text, ",", c.intermediate_size, ",", c.moe_intermediate_size, ",",
                  c.n_routed_experts, ",", c.n_shared_experts, ",", c.num_experts_per_tok, ",",
                  c.first_k_dense_replace, ",", c.moe_layer_freq, ",", c.n_group, ",", c.topk_group,
                  ",", Name(c.scoring_func), ",", Name(c.topk_method), ",", c.norm_topk_prob, ",",
                  Bits(c.routed_scaling_factor), ",", c.tie_word_embeddings);
  if (c.quantization) absl::StrAppend(&text, ",fp8,", c.quantization->power_of_two_scales);
  return Hash128(text.data(), text.size());
}

Hash128Value DigestOf(const Manifest& manifest) {
  // Length-free text is unambiguous here: hashes and dtypes have no newline, and a name is closed
  // by a NUL, which no JSON key of ours can hold raw.
  std::string text = absl::StrCat(kFormat, "\n", ToHex(manifest.config), "\n");
  for (const auto& [name, tensor] : manifest.tensors) {
    absl::StrAppend(&text, name, absl::string_view("\0", 1), Name(tensor.dtype));
    for (const int64_t dimension : tensor.shape) absl::StrAppend(&text, ",", dimension);
    absl::StrAppend(&text, "=", ToHex(tensor.xxh3_128), "\n");
  }
  return Hash128(text.data(), text.size());
}

absl::StatusOr<Manifest> ComputeManifest(const Checkpoint& checkpoint, const ModelConfig& config) {
  Manifest manifest;
  manifest.config = HashOfConfig(config);
  for (const Checkpoint::Entry& entry : checkpoint.entries()) {
    ASSIGN_OR_RETURN(const absl::Span<const std::byte> bytes, entry.file->Bytes(*entry.info));
    manifest.tensors[entry.info->name] =
        ManifestTensor{entry.info->dtype, entry.info->shape, HashTensor(bytes)};
    entry.file->DontNeed(*entry.info);
  }
  manifest.digest = DigestOf(manifest);
  return manifest;
}

std::string WriteManifest(const Manifest& manifest) {
  JsonValue::Object tensors;
  for (const auto& [name, tensor] : manifest.tensors) {
    JsonValue::Array shape;
    for (const int64_t dimension : tensor.shape) {
      shape.push_back(JsonValue::OfUint(static_cast<uint64_t>(dimension)));
    }
    JsonValue::Object fields;
    fields.emplace_back("dtype", JsonValue::OfString(Name(tensor.dtype)));
    fields.emplace_back("shape", JsonValue::OfArray(std::move(shape)));
    fields.emplace_back("xxh3_128", JsonValue::OfString(ToHex(tensor.xxh3_128)));
    tensors.emplace_back(name, JsonValue::OfObject(std::move(fields)));
  }
  JsonValue::Object root;
  root.emplace_back("format", JsonValue::OfString(kFormat));
  root.emplace_back("digest", JsonValue::OfString(ToHex(manifest.digest)));
  root.emplace_back("config", JsonValue::OfString(ToHex(manifest.config)));
  root.emplace_back("tensors", JsonValue::OfObject(std::move(tensors)));
  return WriteJson(JsonValue::OfObject(std::move(root)), 0);
}

absl::StatusOr<Manifest> ParseManifest(absl::string_view json) {
  JsonLimits limits;
  limits.max_values = 16'000'000;
  limits.max_depth = 4;
  absl::StatusOr<JsonValue> root = ParseJson(json, limits);
  if (!root.ok()) return Annotate(root.status(), "manifest");
  if (root->AsObject() == nullptr) return Bad("(root)", "expected an object");
  const JsonValue* format = root->Find("format");
  if (format == nullptr || format->AsString() == nullptr || *format->AsString() != kFormat) {
    return Bad("format", absl::StrCat("expected \"", kFormat, "\""));
  }
  Manifest manifest;
  ASSIGN_OR_RETURN(manifest.config, HashField(*root, "config", ""));
  ASSIGN_OR_RETURN(manifest.digest, HashField(*root, "digest", ""));
  const JsonValue* tensors = root->Find("tensors");
  if (tensors == nullptr || tensors->AsObject() == nullptr) {
    return Bad("tensors", "expected an object");
  }
  for (const auto& [name, value] : *tensors->AsObject()) {
    if (name.find('\0') != std::string::npos) return Bad("tensors", "a name holds a NUL");
    ASSIGN_OR_RETURN(ManifestTensor tensor, ParseManifestTensor(name, value));
    manifest.tensors.emplace(name, std::move(tensor));
  }
  if (DigestOf(manifest) != manifest.digest) {
    return Bad("digest", "does not follow from the config and tensors listed");
  }
  return manifest;
}

std::string DefaultManifestCacheDir() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && cache[0] == '/') return absl::StrCat(cache, "/moebius");
  const char* home = std::getenv("HOME");
  if (home != nullptr && home[0] == '/') return absl::StrCat(home, "/.cache/moebius");
  return "";
}

absl::StatusOr<Manifest> LoadOrComputeManifest(const Checkpoint& checkpoint,
                                               const ModelConfig& config,
                                               const std::string& cache_dir) {
  const std::string beside = absl::StrCat(checkpoint.dir(), "/", kManifestFileName);
  if (FileExists(beside)) return LoadManifest(beside, checkpoint, config);
  const std::string cached = cache_dir.empty() ? "" : CachePath(checkpoint, cache_dir);
  if (!cached.empty() && FileExists(cached)) {
    absl::StatusOr<Manifest> manifest = LoadManifest(cached, checkpoint, config);
    if (manifest.ok()) return manifest;
    // Unlike the file beside the model, the cache is ours alone: a directory that now holds another
    // model is a stale entry, not a contradiction.
    LOG_WARNING(absl::StrCat("stale manifest: ", manifest.status().message()));
  }
  ASSIGN_OR_RETURN(Manifest manifest, ComputeManifest(checkpoint, config));
  const std::string json = WriteManifest(manifest);
  absl::Status stored = ReplaceFile(beside, json);
  if (!stored.ok() && !cached.empty()) {
    // Creates the last two levels only: a home directory is expected to exist.
    const std::string parent = cache_dir.substr(0, cache_dir.rfind('/'));
    if (!parent.empty()) ::mkdir(parent.c_str(), 0755);
    ::mkdir(cache_dir.c_str(), 0755);
    stored = ReplaceFile(cached, json);
  }
  if (!stored.ok()) {
    LOG_WARNING(absl::StrCat("the manifest could not be stored: ", stored.message()));
  }
  return manifest;
}

absl::Status VerifyTensors(const Manifest& manifest, const Checkpoint& checkpoint,
                           absl::Span<const std::string> names) {
  for (const std::string& name : names) {
    const Checkpoint::Entry entry = checkpoint.Find(name);
    const auto it = manifest.tensors.find(name);
    if (entry.file == nullptr || it == manifest.tensors.end()) {
      return absl::NotFoundError(absl::StrCat(checkpoint.dir(), ": tensor \"", name,
                                              "\" is not in the checkpoint and its manifest"));
    }
    ASSIGN_OR_RETURN(const absl::Span<const std::byte> bytes, entry.file->Bytes(*entry.info));
    const Hash128Value actual = HashTensor(bytes);
    if (actual != it->second.xxh3_128) {
      return absl::DataLossError(absl::StrCat(
          entry.file->path(), ": tensor \"", name, "\": bytes hash to ", ToHex(actual),
          ", the manifest says ", ToHex(it->second.xxh3_128), ": the file is damaged or replaced"));
    }
  }
  return absl::OkStatus();
}

}  // namespace moebius::model
