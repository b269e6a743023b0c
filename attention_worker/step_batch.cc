#include "attention_worker/step_batch.h"

#include "base/check.h"

namespace moebius::attention_worker {

StepBatch::StepBatch(int32_t max_rows, uint32_t max_top_n_per_row) : max_top_n(max_top_n_per_row) {
  ids.reserve(max_rows);
  rows.reserve(max_rows);
  first_row.reserve(max_rows + 1);
  head.reserve(max_rows);
  first_head.reserve(max_rows + 1);
  sampling.reserve(max_rows);
  token_index.reserve(max_rows);
  tokens.resize(max_rows);
  logprobs.resize(max_rows);
  digests.resize(max_rows);
  score_ids.resize(static_cast<size_t>(max_rows) * (1 + max_top_n));
  score_logprobs.resize(score_ids.size());
}

void StepBatch::Build(absl::Span<const StepItem> items) {
  ids.clear();
  rows.clear();
  first_row.clear();
  head.clear();
  first_head.clear();
  sampling.clear();
  token_index.clear();
  for (const StepItem& item : items) {
    const Sequence& sequence = *item.sequence;
    CHECK_GE(static_cast<int64_t>(sequence.block_table.size()),
             BlocksForTokens(item.begin + item.count));
    first_row.push_back(static_cast<int32_t>(ids.size()));
    first_head.push_back(static_cast<int32_t>(head.size()));
    for (int64_t t = item.begin; t < item.begin + item.count; ++t) {
      const auto row = static_cast<int32_t>(ids.size());
      ids.push_back(sequence.tokens[t]);
      rows.push_back({static_cast<int32_t>(t), sequence.block_table.data()});
      const bool is_end = t + 1 == sequence.length();
      if (sequence.is_score) {
        if (t < sequence.scored) continue;  // a recomputed position: its event is out already
        head.push_back({row, true, is_end ? TokenId{-1} : sequence.tokens[t + 1], sequence.top_n});
        sampling.push_back({});
        token_index.push_back(0);
      } else if (is_end) {
        head.push_back({row, false, -1, 0});
        sampling.push_back(sequence.sampling);
        token_index.push_back(static_cast<uint64_t>(t) + 1);
      }
    }
  }
  first_row.push_back(static_cast<int32_t>(ids.size()));
  first_head.push_back(static_cast<int32_t>(head.size()));
  m = static_cast<int32_t>(ids.size());
  heads = static_cast<int32_t>(head.size());
  CHECK_LE(static_cast<size_t>(m), tokens.size());
}

}  // namespace moebius::attention_worker
