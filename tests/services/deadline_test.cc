// Goal: no request outlives its deadline, whichever process has stopped answering, and its place at
// the gateway is free afterwards. Method: SIGSTOP, which closes no connection and runs no timer of
// the process, during a stream and before a score; then SIGCONT, and the same bits as ever.

#include <grpcpp/grpcpp.h>
#include <signal.h>

#include <chrono>
#include <string>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "tests/services/process_cluster.h"

namespace moebius::services {
namespace {

constexpr int64_t kMany = 4000;  // tokens that take longer than any deadline here

v1::ScoreRequest ScoreOf(int64_t tokens, int64_t deadline_ms) {
  v1::ScoreRequest request;
  for (int64_t i = 0; i < tokens; ++i) {
    request.mutable_token_ids()->add_ids(static_cast<int32_t>(3 + i % 4000));
  }
  request.set_deadline_ms(deadline_ms);
  return request;
}

uint64_t CounterOf(const std::map<std::string, uint64_t>& counters, const std::string& name) {
  const auto it = counters.find(name);
  return it == counters.end() ? 0 : it->second;
}

// A call that would end by itself much later than the request's deadline.
std::unique_ptr<grpc::ClientContext> PatientCall() {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  return context;
}

// Stops the named processes once a stream has begun, then asks for a score with the default
// deadline: both must end with DEADLINE_EXCEEDED, and the cluster be as good as before once the
// processes go on.
void ExpectDeadlinesHold(const std::vector<std::string>& stopped) {
  const Result expected = Generate(*OneProcess(), MakeRequest(1));
  LocalClusterOptions options;
  options.role_flags = {{"gateway", {"--default-deadline-ms", "1000"}}};
  ScopedCluster cluster(options);
  const std::string address = cluster->address();
  const auto stub =
      v1::Generation::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));

  v1::GenerateRequest request = MakeRequest(0, kMany);
  request.set_deadline_ms(3000);
  const std::unique_ptr<grpc::ClientContext> stream_call = PatientCall();
  const auto stream = stub->Generate(stream_call.get(), request);
  v1::GenerateEvent event;
  ASSERT_TRUE(stream->Read(&event)) << stream->Finish().error_message();
  for (const std::string& name : stopped) kill(cluster.Pid(name), SIGSTOP);
  const auto start = std::chrono::steady_clock::now();
  v1::ScoreReply reply;
  const grpc::Status score = stub->Score(PatientCall().get(), ScoreOf(8, 0), &reply);
  while (stream->Read(&event)) {
  }
  const grpc::Status streamed = stream->Finish();
  // 5 s at most; the rest is for a machine that is busy with other things.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(15));
  EXPECT_EQ(score.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << score.error_message();
  EXPECT_EQ(streamed.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << streamed.error_message();
  if (stopped[0] != "attention-0") {
    EXPECT_TRUE(absl::StartsWith(score.error_message(), "deadline_ms:")) << score.error_message();
    EXPECT_EQ(event.finish_reason(), v1::FINISH_REASON_DEADLINE) << "the worker can still say so";
  }
  EXPECT_EQ(CounterOf(Counters(address), "in_flight"), 0u);

  for (const std::string& name : stopped) kill(cluster.Pid(name), SIGCONT);
  AwaitCounters(address, [](const auto& counters) {
    return CounterOf(counters, "ready") == 1 && SumOf(counters, "/blocks_used") == 0 &&
           SumOf(counters, "/blocks_total") > 0;
  });
  v1::GenerateRequest good = MakeRequest(1);
  good.set_deadline_ms(60'000);
  ExpectSame(Generate(*cluster.Client(), good), expected, "after all that");
}

TEST(Deadline, HoldsWhenTheAttentionWorkerHasStopped) { ExpectDeadlinesHold({"attention-0"}); }

TEST(Deadline, HoldsWhenTheExpertWorkersHaveStopped) {
  ExpectDeadlinesHold({"expert-0", "expert-1"});
}

TEST(Deadline, HoldsInOneProcess) {
  const std::unique_ptr<GenerationClient> one = OneProcess();
  const Result expected = Generate(*one, MakeRequest(1));
  v1::GenerateRequest request = MakeRequest(0, kMany);
  request.set_deadline_ms(100);
  v1::GenerateEvent last;
  const absl::Status status =
      one->Generate(request, [&](const v1::GenerateEvent& event) { last = event; });
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_DEADLINE);
  EXPECT_FALSE(last.has_token());
  EXPECT_LT(last.usage().completion_tokens(), static_cast<uint64_t>(kMany));
  const auto score = one->Score(ScoreOf(kMany, 1));
  EXPECT_EQ(score.status().code(), absl::StatusCode::kDeadlineExceeded) << score.status();
  ExpectSame(Generate(*one, MakeRequest(1)), expected, "afterwards");
}

}  // namespace
}  // namespace moebius::services
