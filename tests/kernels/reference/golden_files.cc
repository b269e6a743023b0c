#include "tests/kernels/reference/golden_files.h"

#include <cmath>
#include <cstring>
#include <fstream>

#include "base/check.h"
#include "model/safetensors.h"
#include "nlohmann/json.hpp"

namespace moebius::kernels::reference {
namespace {

using nlohmann::json;

json ReadJson(const std::string& path) {
  std::ifstream stream(path);
  CHECK(stream.good());
  return json::parse(stream);
}

std::vector<GoldenGreedy> ReadGreedy(const json& runs) {
  std::vector<GoldenGreedy> out;
  for (const json& run : runs) {
    out.push_back(
        {run.at("prompt"), run.at("token_ids"), run.at("margin"), run.at("compare_steps")});
  }
  return out;
}

// Tensor `name` as a list of row blocks: one for [n, dim], several for [blocks, n, dim].
std::vector<Rows> ReadRows(const model::SafetensorsFile& file, const std::string& name) {
  const model::TensorInfo* info = file.Find(name);
  CHECK(info != nullptr && info->dtype == model::TensorDType::kF32);
  const auto bytes = file.Bytes(*info);
  CHECK(bytes.ok());
  std::vector<int64_t> shape = info->shape;
  if (shape.size() == 2) shape.insert(shape.begin(), 1);
  CHECK_EQ(shape.size(), 3u);
  std::vector<Rows> out;
  const std::byte* from = bytes->data();
  for (int64_t block = 0; block < shape[0]; ++block) {
    Rows rows(shape[1], shape[2]);
    std::memcpy(rows.values.data(), from, rows.values.size() * sizeof(float));
    from += rows.values.size() * sizeof(float);
    out.push_back(std::move(rows));
  }
  return out;
}

}  // namespace

const std::vector<std::string>& GoldenModelNames() {
  static const auto* names =
      new std::vector<std::string>{"v3-groups", "v2-lite",   "v2-groups", "moonlight",
                                   "kimi-k2",   "yarn-long", "v3-fp8",    "v31-fp8"};
  return *names;
}

std::string GoldenDir(const std::string& model) {
  return std::string(MOEBIUS_SOURCE_DIR) + "/tests/golden/" + model;
}

GoldenModel LoadGolden(const std::string& name) {
  const json file = ReadJson(GoldenDir(name) + "/golden.json");
  GoldenModel golden;
  golden.name = name;
  golden.logit_std = file.at("logit_std");
  for (const json& sequence : file.at("sequences")) {
    golden.sequences.push_back({sequence.at("token_ids"), sequence.at("next_logprob"),
                                sequence.at("top_ids"), sequence.at("top_logprob")});
  }
  golden.greedy = ReadGreedy(file.at("greedy"));
  if (file.contains("quantizing_reference")) {
    const json& quantizing = file.at("quantizing_reference");
    golden.has_quantizing_reference = true;
    golden.quantizing_per_std = quantizing.at("per_std");
    golden.quantizing_next_logprob = quantizing.at("next_logprob");
    golden.quantizing_greedy = ReadGreedy(quantizing.at("greedy"));
  }

  const auto tensors = model::SafetensorsFile::Open(GoldenDir(name) + "/golden.safetensors");
  CHECK(tensors.ok());
  golden.hidden_states = ReadRows(**tensors, "hidden_states");
  golden.final_hidden = ReadRows(**tensors, "final_hidden").front();
  golden.logits = ReadRows(**tensors, "logits").front();
  if (file.contains("mtp")) {
    golden.has_mtp = true;
    CHECK_EQ(file.at("mtp").at("sequence").get<size_t>(), golden.detailed);
    golden.mtp_next_logprob = file.at("mtp").at("next_logprob").get<std::vector<double>>();
    golden.mtp_hidden = ReadRows(**tensors, "mtp_hidden").front();
    golden.mtp_logits = ReadRows(**tensors, "mtp_logits").front();
  }
  return golden;
}

GoldenScores LoadGoldenScores() {
  const json file = ReadJson(GoldenDir("scores.json"));
  GoldenScores scores;
  scores.bound_per_std = file.at("bound_per_std");
  scores.mistake_factor = file.at("mistake_factor");
  scores.fp8_factor = file.at("fp8_factor");
  scores.greedy_compare_steps = file.at("greedy_compare_steps");
  for (const auto& [model, entry] : file.at("models").items()) {
    scores.model_bound[model] = entry.at("bound");
  }
  scores.mistakes = file.at("mistakes");
  return scores;
}

double ScorePerStd(const ModelForward& model, const GoldenModel& golden, Rounding rounding) {
  double sum = 0;
  int64_t count = 0;
  for (const GoldenSequence& sequence : golden.sequences) {
    const ForwardResult result = model.Forward(sequence.token_ids, rounding);
    const std::vector<float> got = NextLogProbs(result.logits, sequence.token_ids, 1);
    CHECK_EQ(got.size(), sequence.next_logprob.size());
    for (size_t i = 0; i < got.size(); ++i) sum += std::abs(got[i] - sequence.next_logprob[i]);
    count += static_cast<int64_t>(got.size());
  }
  return sum / static_cast<double>(count) / golden.logit_std;
}

}  // namespace moebius::kernels::reference
