#pragma once

// Reads tests/golden (tools/golden/README.md describes the files). Tests only: a file that is not
// as described ends the test with a message on stderr.

#include <map>
#include <string>
#include <vector>

#include "base/ids.h"
#include "kernels/reference/model_forward.h"

namespace moebius::kernels::reference {

// In the order of tools/golden/README.md.
const std::vector<std::string>& GoldenModelNames();

std::string GoldenDir(const std::string& model);

struct GoldenSequence {
  std::vector<TokenId> token_ids;                // [n]
  std::vector<double> next_logprob;              // [n - 1]
  std::vector<std::vector<TokenId>> top_ids;     // [n][5]
  std::vector<std::vector<double>> top_logprob;  // [n][5]
};

struct GoldenGreedy {
  std::vector<TokenId> prompt;
  std::vector<TokenId> token_ids;
  std::vector<double> margin;
  int64_t compare_steps = 0;
};

struct GoldenModel {
  std::string name;
  double logit_std = 0;
  std::vector<GoldenSequence> sequences;
  std::vector<GoldenGreedy> greedy;

  // FP8 models only.
  bool has_quantizing_reference = false;
  double quantizing_per_std = 0;
  std::vector<std::vector<double>> quantizing_next_logprob;  // per sequence
  std::vector<GoldenGreedy> quantizing_greedy;

  // The sequence whose rows are kept whole, and the rows.
  size_t detailed = 1;
  std::vector<Rows> hidden_states;  // [layers + 1]
  Rows final_hidden;
  Rows logits;

  bool has_mtp = false;
  std::vector<double> mtp_next_logprob;  // of sequence `detailed`
  Rows mtp_hidden;
  Rows mtp_logits;
};

GoldenModel LoadGolden(const std::string& name);

struct GoldenScores {
  double bound_per_std = 0;
  double mistake_factor = 0;
  double fp8_factor = 0;
  int64_t greedy_compare_steps = 0;
  std::map<std::string, double> model_bound;
  std::map<std::string, std::map<std::string, double>> mistakes;  // [mistake][model]
};

GoldenScores LoadGoldenScores();

// The log-probabilities that `model` gives to all sequences of `golden`, against theirs: mean
// absolute difference per unit of logit standard deviation.
double ScorePerStd(const ModelForward& model, const GoldenModel& golden, Rounding rounding);

}  // namespace moebius::kernels::reference
