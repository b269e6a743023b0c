#pragma once

// Batches of logits for tests of the sampler, and the buffers that they run in.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/types/span.h"
#include "kernels/cuda/sampling/sampling.h"
#include "tests/kernels/cuda/batch_dependent_choice.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Batch {
  int64_t vocab = 0;
  int64_t stride = 0;
  std::vector<float> logits;  // [m, stride]
  std::vector<SamplingParams> params;
  std::vector<uint64_t> token_index;
  int64_t m() const { return static_cast<int64_t>(params.size()); }
  absl::Span<const float> row(int64_t i) const {
    return {&logits[static_cast<size_t>(i * stride)], static_cast<size_t>(vocab)};
  }
  void Add(const std::vector<float>& row, const SamplingParams& p, uint64_t index) {
    logits.insert(logits.end(), row.begin(), row.end());
    // Beyond vocab there is what would win if it were read.
    logits.resize(logits.size() + static_cast<size_t>(stride - vocab), kInfinity);
    params.push_back(p);
    token_index.push_back(index);
  }
};

struct Drawn {
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;
};

// Buffers for batches, allocated once: freeing device memory waits for all kernels.
class Runner {
 public:
  Runner(int64_t rows, int64_t stride)
      : logits_(static_cast<size_t>(rows * stride)),
        params_(static_cast<size_t>(rows)),
        index_(static_cast<size_t>(rows)),
        tokens_(static_cast<size_t>(rows)),
        logprobs_(static_cast<size_t>(rows)),
        given_(static_cast<size_t>(rows * kGiven)),
        given_logprobs_(static_cast<size_t>(rows * kGiven)) {}
  explicit Runner(const Batch& batch) : Runner(batch.m(), batch.stride) {}

  SampleParams Prepare(const Batch& batch) {
    logits_.Upload(batch.logits);
    params_.Upload(batch.params);
    index_.Upload(batch.token_index);
    Poison();
    SampleParams p;
    p.m = batch.m();
    p.vocab = batch.vocab;
    p.logits_stride = batch.stride;
    p.logits = logits_.get();
    p.params = params_.get();
    p.token_index = index_.get();
    p.tokens = tokens_.get();
    p.logprobs = logprobs_.get();
    return p;
  }
  void Poison() {
    tokens_.Poison();
    logprobs_.Poison();
  }
  Drawn Read(const Batch& batch) const {
    Drawn drawn{tokens_.Download(), logprobs_.Download()};
    drawn.tokens.resize(batch.params.size());
    drawn.logprobs.resize(batch.params.size());
    return drawn;
  }
  Drawn Draw(const Batch& batch) {
    const absl::Status status = LaunchSample(Prepare(batch), nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "Sample");
    return Read(batch);
  }
  // `given`: kGiven tokens a row.
  std::vector<float> Logprobs(const Batch& batch, const std::vector<TokenId>& given) {
    logits_.Upload(batch.logits);
    given_.Upload(given);
    given_logprobs_.Poison();
    TokenLogprobsParams p;
    p.m = batch.m();
    p.vocab = batch.vocab;
    p.logits_stride = batch.stride;
    p.logits = logits_.get();
    p.per_row = kGiven;
    p.tokens = given_.get();
    p.logprobs = given_logprobs_.get();
    const absl::Status status = LaunchTokenLogprobs(p, nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
    ExpectCudaOk(cudaStreamSynchronize(nullptr), "TokenLogprobs");
    std::vector<float> logprobs = given_logprobs_.Download();
    logprobs.resize(given.size());
    return logprobs;
  }
  // The deliberate mistake, for rows without a stride.
  std::vector<float> LogSumsByBatch(const Batch& batch) {
    logits_.Upload(batch.logits);
    ExpectCudaOk(LaunchLogSumByBatch(logits_.get(), batch.m(), batch.vocab, batch.stride,
                                     logprobs_.get(), nullptr),
                 "variant");
    return Read(batch).logprobs;
  }
  static constexpr int64_t kGiven = 6;

 private:
  DeviceBuffer<float> logits_;
  DeviceBuffer<SamplingParams> params_;
  DeviceBuffer<uint64_t> index_;
  DeviceBuffer<TokenId> tokens_;
  DeviceBuffer<float> logprobs_;
  DeviceBuffer<TokenId> given_;
  DeviceBuffer<float> given_logprobs_;
};

// How logits are distributed.
enum class Shape { kNormal, kWide, kPeaked, kTies, kEqual, kFewFinite, kOneFar, kCount };

// Sums of uniform draws, shaped.
std::vector<float> RandomRow(Prng& random, int64_t vocab, Shape shape);

// Every kind of parameters, none greedy.
std::vector<SamplingParams> Mixture();

}  // namespace moebius::kernels::cuda
