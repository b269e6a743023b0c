#include "tests/kernels/cuda/launch_comparison.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <memory>

#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

constexpr int kPairs = 50, kReplaysACompetitor = 10;
constexpr uint32_t kPoison = 0xcdcdcdcd;  // as in a fresh DeviceBuffer

struct Counts {
  unsigned long long compared, different;
  int first_pair;
};

// Outputs of both sets beside what they are to be.
constexpr int kSpans = 8;
struct Spans {
  uint32_t* found[kSpans];
  const uint32_t* expected[kSpans];
  size_t words[kSpans];
};

__global__ void CompareAndPoison(Spans spans, int pair, Counts* counts) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  unsigned long long compared = 0, different = 0;
  for (int span = 0; span < kSpans; ++span) {
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < spans.words[span];
         i += gridDim.x * blockDim.x) {
      different += spans.found[span][i] != spans.expected[span][i];
      spans.found[span][i] = kPoison;
      ++compared;
    }
  }
  if (compared != 0) atomicAdd(&counts->compared, compared);
  if (different == 0) return;
  atomicAdd(&counts->different, different);
  atomicMin(&counts->first_pair, pair);
}

}  // namespace

LaunchComparison CompareLaunches(const std::array<std::vector<OutputSpan>, 2>& outputs,
                                 const LaunchInto& launch, int replays) {
  LaunchComparison result;
  cudaStream_t stream;
  ExpectCudaOk(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  for (const auto& set : outputs)
    for (const OutputSpan& span : set)
      ExpectCudaOk(cudaMemset(span.data, kPoison & 0xff, span.bytes), "poison");
  ExpectCudaOk(cudaDeviceSynchronize(), "poison");
  const absl::Status alone = launch(0, stream);
  EXPECT_TRUE(alone.ok()) << alone.ToString();
  ExpectCudaOk(cudaStreamSynchronize(stream), "the first launch");

  std::vector<std::unique_ptr<DeviceBuffer<uint8_t>>> expected;
  Spans spans = {};
  int count = 0;
  for (size_t i = 0; i < outputs[0].size(); ++i) {
    const OutputSpan& span = outputs[0][i];
    EXPECT_EQ(span.bytes, outputs[1][i].bytes);
    EXPECT_EQ(span.bytes % 4, 0u);
    EXPECT_LE(count + 2, kSpans);
    expected.push_back(std::make_unique<DeviceBuffer<uint8_t>>(span.bytes));
    ExpectCudaOk(
        cudaMemcpy(expected.back()->get(), span.data, span.bytes, cudaMemcpyDeviceToDevice),
        "what is expected");
    for (const auto& set : outputs) {
      spans.found[count] = static_cast<uint32_t*>(set[i].data);
      spans.expected[count] = reinterpret_cast<const uint32_t*>(expected.back()->get());
      spans.words[count++] = span.bytes / 4;
    }
  }
  DeviceBuffer<Counts> counts(std::vector<Counts>{{0, 0, kPairs}});
  // The first launch is in set 0 still, to be overwritten like the poison in set 1.
  cudaGraph_t graph;
  ExpectCudaOk(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capture");
  for (int pair = 0; pair < kPairs; ++pair) {
    for (const int set : {0, 1}) {
      const absl::Status status = launch(set, stream);
      EXPECT_TRUE(status.ok()) << status.ToString();
    }
    CompareAndPoison<<<132, 512, 0, stream>>>(spans, pair, counts.get());
  }
  ExpectCudaOk(cudaStreamEndCapture(stream, &graph), "capture");
  cudaGraphExec_t pairs;
  ExpectCudaOk(cudaGraphInstantiate(&pairs, graph, 0), "graph");
  for (int done = 0; done < replays;) {
    const CompetingKernel competing;
    for (int i = 0; i < kReplaysACompetitor && done < replays; ++i, ++done) {
      ExpectCudaOk(cudaGraphLaunch(pairs, stream), "graph");
      result.launches += 2 * kPairs;
    }
    ExpectCudaOk(cudaStreamSynchronize(stream), "launches");
    EXPECT_TRUE(competing.Runs()) << "it ended before the launches beside it";
  }
  const Counts found = counts.Download()[0];
  result.words_compared = found.compared;
  result.words_different = found.different;
  if (found.different != 0) result.first_pair = found.first_pair;
  ExpectCudaOk(cudaGraphExecDestroy(pairs), "graph");
  ExpectCudaOk(cudaGraphDestroy(graph), "graph");
  ExpectCudaOk(cudaStreamDestroy(stream), "stream");
  return result;
}

void ExpectEqualLaunches(const std::array<std::vector<OutputSpan>, 2>& outputs,
                         const LaunchInto& launch) {
  const LaunchComparison found = CompareLaunches(outputs, launch, 100);
  uint64_t words = 0;
  for (const OutputSpan& span : outputs[0]) words += span.bytes / 4;
  EXPECT_EQ(found.launches, 10'000);
  EXPECT_EQ(found.words_compared, 10'000 * words);
  EXPECT_EQ(found.words_different, 0u)
      << "the first in pair " << found.first_pair << " of " << kPairs;
  std::printf("%lld launches, each compared: %llu words\n", static_cast<long long>(found.launches),
              static_cast<unsigned long long>(found.words_compared));
  std::fflush(stdout);
}

}  // namespace moebius::kernels::cuda
