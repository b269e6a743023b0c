#pragma once

// The rows of one step as compute work reads them, and what it gives back. Filled on the loop
// thread from the plan, then left alone until the step's compute is done. All arrays are reserved
// at construction; Build allocates nothing.

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention_worker/scheduler.h"
#include "base/ids.h"
#include "kernels/attention.h"
#include "kernels/sampling.h"

namespace moebius::attention_worker {

// A row whose logits are needed: the end of a sequence (a token is drawn) or a position of a score
// request (nothing is drawn).
struct HeadRow {
  int32_t row = 0;  // in the step
  bool is_score = false;
  TokenId scored_token = -1;  // score: the prompt's own next token; -1 at its last position
  uint32_t top_n = 0;         // score
};

struct StepBatch {
  StepBatch(int32_t max_rows, uint32_t max_top_n);

  // Lays out the rows of `items` in order. Returns for item i its first head row through
  // first_head[i]; it has first_head[i + 1] - first_head[i] of them.
  void Build(absl::Span<const StepItem> items);

  int32_t m = 0;
  std::vector<TokenId> ids;                // [m]
  std::vector<kernels::SequenceRow> rows;  // [m]
  std::vector<int32_t> first_row;          // [items + 1]

  int32_t heads = 0;
  std::vector<HeadRow> head;                      // [heads]
  std::vector<int32_t> first_head;                // [items + 1]
  std::vector<kernels::SamplingParams> sampling;  // [heads]; greedy for score rows
  std::vector<uint64_t> token_index;              // [heads] of the token being drawn

  // Out.
  std::vector<TokenId> tokens;    // [heads]
  std::vector<float> logprobs;    // [heads]; score: of scored_token
  std::vector<uint64_t> digests;  // [heads]
  // [heads, 1 + max_top_n]: scored_token, then the most likely ones, best first; -1 = none.
  std::vector<TokenId> score_ids;
  std::vector<float> score_logprobs;
  uint32_t max_top_n;
};

}  // namespace moebius::attention_worker
