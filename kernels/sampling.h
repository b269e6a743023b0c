#pragma once

// Choosing a token from logits, as a pure function (row rule, part e): the result depends on the
// logits row, the parameters, the seed and the token's index in its sequence, on nothing else.

#include <cstdint>

#include "base/float_formats.h"
#include "base/ids.h"

namespace moebius::kernels {

struct SamplingParams {
  float temperature = 0.0f;  // 0 = greedy; ties to the lower id
  int32_t top_k = 0;         // 0 = all
  float top_p = 1.0f;        // (0, 1]
  uint64_t seed = 0;
};

struct SampleParams {
  int64_t m = 0;
  int64_t vocab = 0;  // ids >= vocab (padding rows of the head) are never chosen
  int64_t logits_stride = 0;
  const float* logits = nullptr;           // [m, vocab], row stride logits_stride
  const SamplingParams* params = nullptr;  // [m]
  const uint64_t* token_index = nullptr;   // [m] index t in the sequence of the token being drawn
  TokenId* tokens = nullptr;               // [m] out
  float* logprobs = nullptr;  // [m] out: log softmax of the unmodified logits at the token
};

// Log softmax of given tokens: the bits that SampleParams::logprobs has when it draws that token.
struct TokenLogprobsParams {
  int64_t m = 0;
  int64_t vocab = 0;
  int64_t logits_stride = 0;
  const float* logits = nullptr;  // [m, vocab], row stride logits_stride
  int64_t per_row = 0;
  const TokenId* tokens = nullptr;  // [m, per_row], each within vocab; -1 = none
  float* logprobs = nullptr;        // [m, per_row] out; 0 for none
};

// 64-bit digest of a token event: XXH3 over the bits of the final hidden row (after model.norm) and
// of the token's float32 log-probability. Equal digests are how two runs prove that they agree.
struct RowDigestParams {
  int64_t m = 0;
  int64_t dim = 0;
  const Bf16* hidden = nullptr;  // [m, dim], row stride hidden_stride
  int64_t hidden_stride = 0;
  const float* logprobs = nullptr;  // [m]
  uint64_t* digests = nullptr;      // [m] out
};

}  // namespace moebius::kernels
