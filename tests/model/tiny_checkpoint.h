#pragma once

// Makes model directories of a few kilobytes for tests: a complete DeepSeek-V3-shaped checkpoint
// with random weights (scales and norms positive), FP8 or BF16, in one file or in shards, with or
// without the MTP layer.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "model/safetensors_writer.h"

namespace moebius::model {

struct TinyOptions {
  bool fp8 = true;
  bool mtp = true;
  bool mtp_copies = false;  // of embedding and head within the MTP layer
  bool q_lora = true;
  int shards = 1;
  uint64_t seed = 1;
};

// hidden 160, 3 layers (1 dense), 8 experts in 4 groups, ragged 128-blocks everywhere.
std::string TinyConfigJson(const TinyOptions& options);

struct TinyTensor {
  TensorSpec spec;
  std::vector<std::byte> data;
};

// By name. Edit before WriteTinyTensors to make a bad checkpoint.
std::map<std::string, TinyTensor> TinyTensors(const TinyOptions& options);

// Creates `dir` anew with config.json, the tensors and, for several shards, the index. A weight and
// its scale usually fall into different shards.
void WriteTinyTensors(const std::string& dir, const TinyOptions& options,
                      const std::map<std::string, TinyTensor>& tensors);
void WriteTinyCheckpoint(const std::string& dir, const TinyOptions& options);

void WriteTextFile(const std::string& path, const std::string& content);

}  // namespace moebius::model
