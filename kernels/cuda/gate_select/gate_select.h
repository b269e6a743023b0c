#pragma once

// Chooses experts from float32 gate logits on the GPU (kernels/moe.h, GateSelectParams; DeepSeek-V3
// report section 2.1.2, DeepSeek-V2 report section 2.1.2): the choices, order and ties of
// kernels/reference/gate.h.
//
// Arithmetic: that of the CPU kernels, so experts and weights have the CPU kernels' bits.
//   sigmoid: 1 / (1 + exp(-z)), both operations rounded to nearest; softmax: exp(z - max) / sum,
//   16 partial sums (partial l adds the experts e with e mod 16 = l, ascending), folded l and l +
//   8, then 4, 2, 1. exp is kernels/cuda/device/exp.cuh. The sum for norm_topk_prob runs over the
//   slots in ascending order. A row's result is a function of its own logits, the bias and the
//   configuration.
// A NaN choice value counts as -infinity: ids are distinct and in range whatever the row holds; the
// weight of a chosen NaN score is NaN (and, if weights are normalised, its row's other weights).

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/moe.h"

namespace moebius::kernels::cuda {

// Limits of one gate: a warp holds a token's scores in registers.
inline constexpr int32_t kGateMaxExperts = 512;
inline constexpr int32_t kGateMaxExpertsPerToken = 16;

// Enqueues on `stream`; pointers of `params` are device pointers, borrowed until the stream has
// passed the launch (logits and bias 4-aligned; 16-aligned logits with n_routed_experts a multiple
// of 128 load faster). m = 0 does nothing. The kernel may start while the one before it in the
// stream ends; it waits for it before it touches memory, the bias excepted: that is not for the
// kernel just before to write. Errors: INVALID_ARGUMENT naming the field;
// INTERNAL if the launch fails. Any thread.
absl::Status LaunchGateSelect(const GateSelectParams& params, cudaStream_t stream);

}  // namespace moebius::kernels::cuda
