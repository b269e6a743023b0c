// Goal: each call of moebius.v1.Generation, as a client of the generated stub sees it, does what
// one process does; and a request that its client ends early, by whatever means, leaves nothing
// behind. Method: one running cluster, shared by all tests here.

#include <grpcpp/grpcpp.h>

#include <chrono>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "model/manifest.h"
#include "tests/services/process_cluster.h"

namespace moebius::services {
namespace {

constexpr int64_t kMany = 4000;  // tokens that take longer than any test waits

class GenerationApi : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    cluster_ = new ScopedCluster(LocalClusterOptions{});
    one_ = OneProcess().release();
    stub_ = v1::Generation::NewStub(
        grpc::CreateChannel((*cluster_)->address(), grpc::InsecureChannelCredentials()));
  }
  static void TearDownTestSuite() {
    stub_.reset();
    delete one_;
    delete cluster_;
  }
  // Nothing is held for a request that has ended: no place at the gateway, no sequence, no block.
  void TearDown() override {
    AwaitCounters((*cluster_)->address(), [](const auto& counters) {
      const auto in_flight = counters.find("in_flight");
      return in_flight != counters.end() && in_flight->second == 0 &&
             SumOf(counters, "/running") == 0 && SumOf(counters, "/waiting") == 0 &&
             SumOf(counters, "/blocks_used") == 0 && SumOf(counters, "/blocks_total") > 0;
    });
  }
  static v1::GenerateRequest Endless() {
    v1::GenerateRequest request = MakeRequest(1, kMany);
    request.set_deadline_ms(600'000);
    return request;
  }

  static inline ScopedCluster* cluster_ = nullptr;
  static inline GenerationClient* one_ = nullptr;
  static inline std::unique_ptr<v1::Generation::Stub> stub_;
};

TEST_F(GenerationApi, ListModelsTellsWhatIsServed) {
  grpc::ClientContext context;
  v1::ListModelsReply reply;
  ASSERT_TRUE(stub_->ListModels(&context, v1::ListModelsRequest(), &reply).ok());
  ASSERT_EQ(reply.models_size(), 1);
  const v1::ModelInfo& model = reply.models(0);
  const ModelHost& host = one_->local()->host();
  EXPECT_EQ(model.id(), "moebius-tiny");
  EXPECT_EQ(model.digest(), model::ToHex(host.manifest.digest));
  EXPECT_EQ(model.digest().size(), 32u);
  EXPECT_EQ(model.max_context(), 4096);
  EXPECT_EQ(model.vocab_size(), host.config.vocab_size);
  EXPECT_TRUE(model.has_tokenizer());
}

TEST_F(GenerationApi, ScoreGivesTheBitsOfOneProcess) {
  v1::ScoreRequest request;
  request.set_model("moebius-tiny");
  request.set_request_id("score-1");
  request.set_top(3);
  for (int i = 0; i < 200; ++i) request.mutable_token_ids()->add_ids((i * 37 + 5) % 4000);
  const absl::StatusOr<v1::ScoreReply> expected = one_->Score(request);
  ASSERT_TRUE(expected.ok()) << expected.status();
  ASSERT_EQ(expected->positions_size(), 200);
  grpc::ClientContext context;
  v1::ScoreReply reply;
  const grpc::Status status = stub_->Score(&context, request, &reply);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(reply.SerializeAsString(), expected->SerializeAsString());
}

TEST_F(GenerationApi, EventsAreNumberedNamedAndCounted) {
  v1::GenerateRequest request = MakeRequest(3, 10);
  for (const std::string name : {"mine", ""}) {
    request.set_request_id(name);
    grpc::ClientContext context;
    const auto reader = stub_->Generate(&context, request);
    v1::GenerateEvent event;
    uint64_t index = 0;
    while (reader->Read(&event)) {
      EXPECT_EQ(event.token_index(), index++);
      if (name.empty()) {
        EXPECT_TRUE(absl::StartsWith(event.request_id(), "req-")) << event.request_id();
      } else {
        EXPECT_EQ(event.request_id(), name);
      }
      EXPECT_EQ(event.has_usage(), index == 10);
    }
    ASSERT_TRUE(reader->Finish().ok());
    EXPECT_EQ(index, 10u);
    EXPECT_EQ(event.finish_reason(), v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(event.usage().completion_tokens(), 10u);
    EXPECT_EQ(event.usage().prompt_tokens(), static_cast<uint64_t>(request.token_ids().ids_size()));
  }
}

TEST_F(GenerationApi, AStopStringEndsTheStreamWhereItEndsInOneProcess) {
  v1::GenerateRequest request;
  request.set_text("The admiral said");
  request.set_max_tokens(40);
  request.set_ignore_eos(true);
  std::string text;
  ASSERT_TRUE(
      one_->Generate(request, [&](const v1::GenerateEvent& event) { text += event.text(); }).ok());
  ASSERT_GT(text.size(), 40u);
  const std::string stop = text.substr(text.size() / 2, 5);
  request.add_stop("never in the text \x01");
  request.add_stop(stop);
  const Result expected = Generate(*one_, request);
  ASSERT_LT(expected.ids.size(), 40u);
  v1::GenerateEvent last;
  std::string until;
  Result got;
  got.status = cluster_->Client()->Generate(request, [&](const v1::GenerateEvent& event) {
    got.ids.push_back(event.token_id());
    got.digests.push_back(event.row_digest());
    until += event.text();
    last = event;
  });
  ExpectSame(got, expected, "with a stop string");
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_TRUE(absl::StrContains(until, stop)) << until;
  EXPECT_TRUE(absl::StartsWith(text, until)) << until;
}

TEST_F(GenerationApi, ADeadlineOfTheRequestEndsItAndSaysHowFarItCame) {
  v1::GenerateRequest request = Endless();
  request.set_deadline_ms(400);
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, request);
  v1::GenerateEvent event;
  uint64_t tokens = 0;
  while (reader->Read(&event)) tokens += event.has_token() ? 1 : 0;
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << status.error_message();
  EXPECT_TRUE(absl::StartsWith(status.error_message(), "deadline_ms:")) << status.error_message();
  EXPECT_EQ(event.finish_reason(), v1::FINISH_REASON_DEADLINE);
  EXPECT_EQ(event.usage().completion_tokens(), tokens);
  EXPECT_LT(tokens, static_cast<uint64_t>(kMany));
}

TEST_F(GenerationApi, ADeadlineOfTheCallEndsIt) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(400));
  const auto reader = stub_->Generate(&context, Endless());
  v1::GenerateEvent event;
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(GenerationApi, AClientThatCancelsIsForgotten) {
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, Endless());
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  const auto counters = cluster_->Counters();
  EXPECT_EQ(counters.at("in_flight"), 1u) << "it is aboard";
  context.TryCancel();
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(GenerationApi, AScoreWhoseCallEndsIsForgotten) {
  v1::ScoreRequest request;
  for (int i = 0; i < kMany; ++i) request.mutable_token_ids()->add_ids(3 + i % 4000);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  v1::ScoreReply reply;
  EXPECT_EQ(stub_->Score(&context, request, &reply).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
}

}  // namespace
}  // namespace moebius::services
