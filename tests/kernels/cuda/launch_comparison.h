#pragma once

// Thousands of launches of one kernel, every one of them compared with the first.

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"

namespace moebius::kernels::cuda {

// Device memory that a launch writes; `bytes` is a multiple of 4.
struct OutputSpan {
  void* data;
  size_t bytes;
};

// Launches the kernel once, on `stream`, into the outputs of set 0 or 1. It is recorded into a
// graph, so the same calls are replayed.
using LaunchInto = std::function<absl::Status(int set, cudaStream_t stream)>;

struct LaunchComparison {
  int64_t launches = 0;         // without the first, which gives what is expected
  uint64_t words_compared = 0;  // of 4 bytes, counted where they are compared
  uint64_t words_different = 0;
  int first_pair = -1;  // the lowest place in the graph at which a word was different
};

// Replays a graph of 50 pairs of launches beside competing kernels, a new one for every ten
// replays. The two launches of a pair write different sets of outputs and share whatever else they
// name, so the second may start while the first runs, as in a layer. A kernel behind the pair
// counts the words of both sets that differ from what one launch alone has left, and poisons them.
// It lets the next launch start at once: one that writes before the kernels in front have ended has
// its words poisoned. A competing kernel that ended too early fails the test.
LaunchComparison CompareLaunches(const std::array<std::vector<OutputSpan>, 2>& outputs,
                                 const LaunchInto& launch, int replays);

// 10,000 launches of which none may leave another word than the first; prints what was compared.
void ExpectEqualLaunches(const std::array<std::vector<OutputSpan>, 2>& outputs,
                         const LaunchInto& launch);

}  // namespace moebius::kernels::cuda
