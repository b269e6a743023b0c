#pragma once

// The identity of a model: a digest over the config's essentials and every tensor's name, dtype,
// shape and XXH3-128 of its bytes. Two processes whose digests agree compute with the same numbers;
// it is part of every handshake. XXH3 finds accidents (a truncated copy, a flipped bit, the wrong
// fine-tune), not forgers.
//
// Hashing all tensors costs one read of the checkpoint, so it is done once and kept in
// moebius.manifest.json beside the model, or in a cache directory where the model's is read-only.
// Each worker then verifies the tensors it hosts against the manifest: a changed byte is found, and
// the tensor named, by whoever would have computed with it. A manifest whose names, dtypes or
// shapes do not fit the files is refused, not silently made anew: delete it if the model was
// changed on purpose.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/hash.h"
#include "model/checkpoint.h"
#include "model/config.h"

namespace moebius::model {

inline constexpr char kManifestFileName[] = "moebius.manifest.json";

struct ManifestTensor {
  TensorDType dtype = TensorDType::kF32;
  std::vector<int64_t> shape;
  Hash128Value xxh3_128;  // of the tensor's bytes
  friend bool operator==(const ManifestTensor&, const ManifestTensor&) = default;
};

struct Manifest {
  Hash128Value config;                            // HashOfConfig
  std::map<std::string, ManifestTensor> tensors;  // ordered: the digest runs over it
  Hash128Value digest;                            // DigestOf

  // What frames and handshakes carry.
  uint64_t digest64() const { return digest.low; }
};

// 32 hexadecimal digits, high half first, and back (false if malformed).
std::string ToHex(const Hash128Value& hash);
bool FromHex(absl::string_view text, Hash128Value* hash);

// Every field of the config that reaches the arithmetic, in a fixed text form. Token ids for start
// and end do not: they may be changed without making another model.
Hash128Value HashOfConfig(const ModelConfig& config);

// Digest over config hash and tensors (`digest` itself is not read).
Hash128Value DigestOf(const Manifest& manifest);

// Reads and hashes every tensor: minutes per 100 GB. The pages are released as it goes.
absl::StatusOr<Manifest> ComputeManifest(const Checkpoint& checkpoint, const ModelConfig& config);

std::string WriteManifest(const Manifest& manifest);
// Errors: INVALID_ARGUMENT naming the field; also if the digest does not follow from the rest.
absl::StatusOr<Manifest> ParseManifest(absl::string_view json);

// `$XDG_CACHE_HOME/moebius`, else `$HOME/.cache/moebius`, else "" (no cache).
std::string DefaultManifestCacheDir();

// The manifest beside the model, else the one in cache_dir, else computed and stored at the first
// of the two places that can be written (if neither can, it is computed and not stored). cache_dir
// may be "".
absl::StatusOr<Manifest> LoadOrComputeManifest(const Checkpoint& checkpoint,
                                               const ModelConfig& config,
                                               const std::string& cache_dir);

// Reads the named tensors (WeightStorage::tensor_names) and compares their hashes. Errors:
// DATA_LOSS names file and tensor.
absl::Status VerifyTensors(const Manifest& manifest, const Checkpoint& checkpoint,
                           absl::Span<const std::string> names);

}  // namespace moebius::model
