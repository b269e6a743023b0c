#pragma once

// `moebius convert`: rewrites a model directory with BF16 or FP8 (F8_E4M3, 128x128 blocks) weights.
// Quantised are the matrices that the published FP8 checkpoints quantise: the projections of
// attention, MLPs and experts; embedding, head, gate, norms, bias and eh_proj stay as they are.
//
// Works tensor by tensor, so memory is bounded by the largest one. The result appears under its
// name only when complete and checked; an existing output is never overwritten. One thread.

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace moebius::model {

enum class ConvertTarget : uint8_t { kBf16, kFp8 };

struct ConvertOptions {
  ConvertTarget target = ConvertTarget::kBf16;
  // A shard is closed before it would exceed this; one shard is written as model.safetensors.
  uint64_t max_shard_bytes = uint64_t{5} << 30;
  // Called after each tensor, with bytes written so far and in all.
  std::function<void(uint64_t done_bytes, uint64_t total_bytes)> progress;
};

// True for the names of matrices that are FP8 in an FP8 checkpoint.
bool IsQuantizedName(absl::string_view tensor_name);

// To BF16, F32 matrices are rounded once too (an F32 checkpoint is served in no other way); vectors
// stay as they are.
//
// Reads `in_dir`, creates `out_dir` (which must not exist, or be empty) with the converted weights,
// config.json with quantization_config set or removed, and the tokenizer and generation files as
// they are. Errors: ALREADY_EXISTS; FAILED_PRECONDITION if the model has the target's format
// already; INVALID_ARGUMENT naming file and tensor.
absl::Status ConvertModel(const std::string& in_dir, const std::string& out_dir,
                          const ConvertOptions& options);

}  // namespace moebius::model
