#include "attention_worker/request_check.h"

#include <limits>
#include <string>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace moebius::attention_worker {
namespace {

const RequestLimits kLimits{.vocab_size = 100,
                            .max_context = 1000,
                            .num_blocks = 4,
                            .max_top_n = 5,
                            .has_tokenizer = false};

Submit Good() {
  Submit request;
  request.prompt = {1, 2, 3};
  request.max_tokens = 10;
  return request;
}

void ExpectRefused(const Submit& request, absl::StatusCode code, const std::string& field) {
  const absl::Status status = CheckRequest(request, kLimits);
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_TRUE(absl::StartsWith(status.message(), field)) << status;
}

TEST(RequestCheckTest, AcceptsAGoodOne) {
  EXPECT_TRUE(CheckRequest(Good(), kLimits).ok());
  EXPECT_EQ(FinalLength(Good(), kLimits), 13);
}

TEST(RequestCheckTest, NamesTheFieldOfABadPrompt) {
  Submit request = Good();
  request.prompt.clear();
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "prompt:");
  request.prompt = {1, 100};
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "prompt[1]:");
  request.prompt = {-1};
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "prompt[0]:");
  request.prompt.assign(1000, 1);
  ExpectRefused(request, absl::StatusCode::kOutOfRange, "prompt:");
  request.prompt.assign(257, 1);
  ExpectRefused(request, absl::StatusCode::kOutOfRange, "prompt:");
}

TEST(RequestCheckTest, NamesTheFieldOfBadGeneratedTokens) {
  Submit request = Good();
  request.generated = {4, 5, 6};
  EXPECT_TRUE(CheckRequest(request, kLimits).ok());
  EXPECT_EQ(FinalLength(request, kLimits), 13) << "they are a part of max_tokens";
  request.generated = {4, 100};
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "generated[1]:");
  request.generated.assign(10, 1);
  EXPECT_TRUE(CheckRequest(request, kLimits).ok());
  request.generated.assign(11, 1);
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "generated:");
  request.max_tokens = 2000;
  request.generated.assign(998, 1);
  ExpectRefused(request, absl::StatusCode::kOutOfRange, "generated:");
  request = Good();
  request.generated = {4};
  request.max_tokens = 0;
  request.on_score = [](const ScoreEvent&) {};
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "generated:");
}

TEST(RequestCheckTest, ARequestThatCanNeverFitIsRefused) {
  Submit request = Good();
  request.max_tokens = 254;  // 3 + 254 tokens, of which the last needs no row: 256 rows, 4 blocks
  EXPECT_TRUE(CheckRequest(request, kLimits).ok());
  request.max_tokens = 255;
  ExpectRefused(request, absl::StatusCode::kOutOfRange, "max_tokens:");
  request.max_tokens = std::numeric_limits<uint64_t>::max();
  ExpectRefused(request, absl::StatusCode::kOutOfRange, "max_tokens:");
}

TEST(RequestCheckTest, MaxTokensBeyondTheContextIsCut) {
  RequestLimits roomy = kLimits;
  roomy.num_blocks = 100;
  Submit request = Good();
  request.max_tokens = std::numeric_limits<uint64_t>::max();
  EXPECT_TRUE(CheckRequest(request, roomy).ok());
  EXPECT_EQ(FinalLength(request, roomy), 1000);
}

TEST(RequestCheckTest, NamesTheFieldOfBadSampling) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {-0.5f, nan, std::numeric_limits<float>::infinity()}) {
    Submit request = Good();
    request.sampling.temperature = bad;
    ExpectRefused(request, absl::StatusCode::kInvalidArgument, "temperature:");
  }
  for (const float bad : {0.0f, -1.0f, 1.5f, nan}) {
    Submit request = Good();
    request.sampling.top_p = bad;
    ExpectRefused(request, absl::StatusCode::kInvalidArgument, "top_p:");
  }
  Submit request = Good();
  request.sampling.top_k = -1;
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "top_k:");
  request = Good();
  request.deadline_ms = -1;
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "deadline_ms:");
  request = Good();
  request.stop_strings = {"x"};
  ExpectRefused(request, absl::StatusCode::kFailedPrecondition, "stop_strings:");
}

TEST(RequestCheckTest, Score) {
  Submit request = Good();
  request.on_score = [](const ScoreEvent&) {};
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "max_tokens:");
  request.max_tokens = 0;
  request.top_n = 6;
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "top_n:");
  request.top_n = 5;
  EXPECT_TRUE(CheckRequest(request, kLimits).ok());
}

}  // namespace
}  // namespace moebius::attention_worker
