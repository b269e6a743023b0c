#pragma once

// `moebius inspect`: what a model directory holds, from its config and headers alone (no tensor
// data are read): parameters, element types, experts, and the bytes each role would host.

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "model/checkpoint.h"
#include "model/config.h"

namespace moebius::model {

struct ModelReport {
  ModelConfig config;
  int64_t tensors = 0;
  int64_t files = 0;

  // Counts of weights; FP8 scales are not parameters.
  int64_t parameters = 0;            // main model
  int64_t mtp_parameters = 0;        // MTP modules, without copies of embedding and head
  int64_t activated_parameters = 0;  // main model, per token, embedding and head included

  struct TypeCount {
    int64_t tensors = 0;
    int64_t bytes = 0;
  };
  std::map<std::string, TypeCount> types;  // by name of the element type

  // Bytes that each role reads from the files, scales included.
  int64_t attention_worker_bytes = 0;  // all but routed experts and ignored tensors, MTP included
  int64_t gate_bytes = 0;              // of that: gates and biases, what a router alone needs
  int64_t expert_bytes = 0;            // one routed expert (the largest)
  int64_t all_experts_bytes = 0;       // every routed expert of every layer, MTP included
  int64_t ignored_bytes = 0;  // the MTP module's copies of embedding and head, unknown names
  int64_t moe_layers = 0;     // with routed experts, MTP included

  int64_t latent_cache_bytes_per_token = 0;  // BF16, all layers, MTP included
};

ModelReport InspectModel(const Checkpoint& checkpoint, const ModelConfig& config);

// For people: one fact a line.
std::string FormatReport(const ModelReport& report);
// For programs: a JSON object with the fields' names.
std::string ReportToJson(const ModelReport& report);

}  // namespace moebius::model
