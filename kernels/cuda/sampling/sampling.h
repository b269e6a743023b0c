#pragma once

// Choosing tokens from logits on the GPU (kernels/sampling.h): the definition of
// kernels/reference/sampling.h in integers.
//
// Weights. e_i = 2^((logit_i - max) * (log2(e) / temperature)), by the hardware's ex2 of a float32
// product, then rounded to a multiple of 2^-41 (nearest): mass_i, a 42-bit integer. Every sum of
// weights is a sum of these integers, so it is exact and no order of summation can reach a bit: a
// row's result is a function of its own logits, parameters and token index.
//   temperature 0 (or less, or NaN): the largest logit, ties to the lower id.
//   otherwise, in the order of descending logit, ties ascending id:
//     limit  = mass of the first top_k (0: of all);
//     kept   = the shortest prefix with mass >= top_p * limit (top_p >= 1: limit), at least one;
//     token  = the first whose running mass exceeds u * mass(kept), u = ToUnitFloat(CounterDraw(
//              seed, 0, token_index)).
//   Products with top_p and u are double, rounded to nearest.
// logprob = (logit - max) - log(sum of masses at temperature 1), the logarithm in double; within
// 2e-6 of the exact value, or of 2^-23 relative where that is more.
//
// A NaN logit counts as -infinity for the choice. If no weight is positive (the maximum is
// +infinity or every logit -infinity), the first of the largest logits is chosen. A row with a NaN
// or +infinity, or with -infinity alone, has NaN log-probabilities.

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/sampling.h"

namespace moebius::kernels::cuda {

// What the tests cover; a slice of more logits would have no room for the bits of its lists.
inline constexpr int64_t kSamplingMaxVocab = 400'000;

// Both enqueue on `stream`; all pointers are device pointers, borrowed until the stream has passed
// the launch. A 16-aligned `logits` with a stride and a vocab that are multiples of 4 loads faster;
// the bits are the same. The kernels may start while the one before them in the stream ends; they
// wait for it before they touch memory. m = 0 does nothing. Errors: INVALID_ARGUMENT naming the
// field; INTERNAL if the launch fails. Any thread.
absl::Status LaunchSample(const SampleParams& params, cudaStream_t stream);

// A token outside of [0, vocab) and other than -1 gets NaN.
absl::Status LaunchTokenLogprobs(const TokenLogprobsParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
