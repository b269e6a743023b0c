// Goal: whatever an attention worker does in the middle of a stream, the client of the gateway sees
// one stream without gaps, repeats or other tokens, or one clear error. Method: a real gateway
// before a controller and attention workers made by hand, which follow a script. With real workers:
// any_process_dies_test; in simulation: cluster_sim_test.

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "services/gateway/gateway_service.h"

namespace moebius::services {
namespace {

using Writer = grpc::ServerWriter<v1::WorkerToken>;
const grpc::Status kGone(grpc::StatusCode::UNAVAILABLE, "connection lost");

// What the model would say: the token at each place of the answer is settled.
int32_t TokenAt(uint64_t index) { return 100 + static_cast<int32_t>(index * 7 % 500); }

v1::WorkerToken Token(uint64_t index, bool last = false) {
  v1::WorkerToken token;
  token.set_token_index(index);
  token.set_has_token(true);
  token.set_token_id(TokenAt(index));
  token.set_row_digest(index * 1000);
  if (last) token.set_finish_reason(v1::FINISH_REASON_LENGTH);
  return token;
}
v1::WorkerToken Beat() {
  v1::WorkerToken token;
  token.set_beat(true);
  return token;
}

// Writes the tokens [request.generated_size(), to), the last one as an end if `ends`.
void Go(const v1::ResolvedRequest& request, Writer& writer, uint64_t to, bool ends = false) {
  writer.Write(Beat());
  for (auto i = static_cast<uint64_t>(request.generated_size()); i < to; ++i) {
    writer.Write(Token(i, ends && i + 1 == to));
  }
}

void AwaitCancellation(grpc::ServerContext& context) {
  std::mutex mutex;
  std::condition_variable never;
  std::unique_lock<std::mutex> lock(mutex);
  while (!context.IsCancelled()) never.wait_for(lock, std::chrono::milliseconds(5));
}

// Its n-th call does what the n-th entry of the script says; those after the last, what that says.
class ScriptedWorker final : public v1::AttentionService::Service {
 public:
  using Act =
      std::function<grpc::Status(grpc::ServerContext&, const v1::ResolvedRequest&, Writer&)>;
  explicit ScriptedWorker(std::vector<Act> script) : script_(std::move(script)) {
    ListenOptions listen;
    listen.address = "127.0.0.1:0";
    server_ = *StartServer(listen, {this});
  }
  ~ScriptedWorker() override { server_.server->Shutdown(std::chrono::system_clock::now()); }

  grpc::Status Generate(grpc::ServerContext* context, const v1::ResolvedRequest* request,
                        Writer* writer) override {
    Act act;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      act = script_[std::min(requests_.size(), script_.size() - 1)];
      requests_.push_back(*request);
    }
    return act(*context, *request, *writer);
  }
  grpc::Status Score(grpc::ServerContext*, const v1::ResolvedScore* request,
                     grpc::ServerWriter<v1::WorkerScore>* writer) override {
    size_t call = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      call = scores_++;
    }
    v1::WorkerScore beat;
    beat.set_beat(true);
    writer->Write(beat);
    for (int i = 0; i < request->prompt_size(); ++i) {
      if (call == 0 && i == 2) return kGone;
      v1::WorkerScore score;
      score.mutable_position()->set_row_digest(static_cast<uint64_t>(i));
      writer->Write(score);
    }
    return grpc::Status::OK;
  }
  const std::string& address() const { return server_.address; }
  std::vector<v1::ResolvedRequest> requests() {
    std::lock_guard<std::mutex> lock(mutex_);
    return requests_;
  }

 private:
  std::mutex mutex_;
  const std::vector<Act> script_;
  std::vector<v1::ResolvedRequest> requests_;
  size_t scores_ = 0;
  RunningServer server_;
};

// Says who is there, whenever that changes.
class ScriptedController final : public v1::Control::Service {
 public:
  ScriptedController() {
    ListenOptions listen;
    listen.address = "127.0.0.1:0";
    server_ = *StartServer(listen, {this});
    view_.set_complete(true);
    view_.set_settled(true);
  }
  ~ScriptedController() override { server_.server->Shutdown(std::chrono::system_clock::now()); }
  void Add(uint64_t node, const std::string& address, const std::string& numerics = "cpu") {
    std::lock_guard<std::mutex> lock(mutex_);
    v1::Worker& worker = *view_.add_workers();
    worker.set_node(node);
    worker.set_incarnation(++incarnation_);
    worker.set_role(v1::ROLE_ATTENTION);
    worker.set_grpc_address(address);
    worker.set_numerics(numerics);
    worker.set_ready(true);
    ++version_;
    changed_.notify_all();
  }
  void Clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    view_.clear_workers();
    ++version_;
  }
  grpc::Status Watch(grpc::ServerContext* context, const v1::WatchRequest*,
                     grpc::ServerWriter<v1::ClusterView>* writer) override {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t told = 0; !context->IsCancelled();) {
      if (told != version_ && !writer->Write(view_)) break;
      told = version_;
      changed_.wait_for(lock, std::chrono::milliseconds(20));
    }
    return grpc::Status::OK;
  }
  const std::string& address() const { return server_.address; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  v1::ClusterView view_;
  uint64_t version_ = 1;
  uint64_t incarnation_ = 0;
  RunningServer server_;
};

class StreamRelayTest : public testing::Test {
 protected:
  struct Stream {
    grpc::Status status;
    std::vector<v1::GenerateEvent> events;
    std::string text;
  };
  void SetUp() override { Start(); }
  void Start(int64_t silence_ms = 60'000) {
    gateway_.reset();
    ServiceFlags flags;
    flags.model = MOEBIUS_SOURCE_DIR "/models/moebius-tiny";
    flags.controller = controller_.address();
    flags.listen.address = "127.0.0.1:0";
    flags.worker_silence_ms = silence_ms;
    absl::StatusOr<std::unique_ptr<Gateway>> gateway = Gateway::Start(flags);
    ASSERT_TRUE(gateway.ok()) << gateway.status();
    gateway_ = *std::move(gateway);
    channel_ = MakeChannel(gateway_->address(), ListenOptions());
    stub_ = v1::Generation::NewStub(channel_);
  }
  void TearDown() override { gateway_->Drain(); }
  ScriptedWorker& Worker(std::vector<ScriptedWorker::Act> script,
                         const std::string& numerics = "cpu") {
    workers_.push_back(std::make_unique<ScriptedWorker>(std::move(script)));
    controller_.Add(workers_.size(), workers_.back()->address(), numerics);
    return *workers_.back();
  }
  // Instead of all those before.
  ScriptedWorker& OnlyWorker(std::vector<ScriptedWorker::Act> script) {
    controller_.Clear();
    workers_.clear();
    return Worker(std::move(script));
  }
  static v1::GenerateRequest Request(int64_t max_tokens = 10) {
    v1::GenerateRequest request;
    for (int32_t id : {5, 6, 7}) request.mutable_token_ids()->add_ids(id);
    request.set_max_tokens(max_tokens);
    request.set_ignore_eos(true);
    request.set_seed(11);
    request.set_deadline_ms(60'000);
    return request;
  }
  Stream Generate(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    auto reader = stub_->Generate(&context, request);
    Stream stream;
    v1::GenerateEvent event;
    while (reader->Read(&event)) {
      stream.text += event.text();
      stream.events.push_back(event);
    }
    stream.status = reader->Finish();
    return stream;
  }
  // The tokens [from, to) in order, the last of them the end.
  static void ExpectWhole(const Stream& stream, uint64_t from = 0, uint64_t to = 10) {
    ASSERT_TRUE(stream.status.ok()) << stream.status.error_message();
    ASSERT_EQ(stream.events.size(), to - from);
    for (uint64_t i = from; i < to; ++i) {
      const v1::GenerateEvent& event = stream.events[i - from];
      EXPECT_EQ(event.token_index(), i);
      EXPECT_EQ(event.token_id(), TokenAt(i));
      EXPECT_EQ(event.row_digest(), i * 1000);
      EXPECT_EQ(event.finish_reason() == v1::FINISH_REASON_LENGTH, i + 1 == to);
    }
    EXPECT_EQ(stream.events.back().usage().completion_tokens(), to);
    EXPECT_EQ(stream.events.back().usage().prompt_tokens(), 3u);
  }
  std::map<std::string, uint64_t> Counters() {
    grpc::ClientContext context;
    v1::StatusReply reply;
    EXPECT_TRUE(
        v1::StatusService::NewStub(channel_)->Status(&context, v1::StatusRequest(), &reply).ok());
    std::map<std::string, uint64_t> counters;
    for (const v1::Counter& counter : reply.counters()) counters[counter.name()] = counter.value();
    return counters;
  }

  static grpc::Status Whole(grpc::ServerContext&, const v1::ResolvedRequest& request,
                            Writer& writer) {
    Go(request, writer, 10, /*ends=*/true);
    return grpc::Status::OK;
  }

  ScriptedController controller_;
  std::vector<std::unique_ptr<ScriptedWorker>> workers_;
  std::unique_ptr<Gateway> gateway_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Generation::Stub> stub_;
};

ScriptedWorker::Act DieBehind(uint64_t tokens, grpc::Status status = kGone) {
  return
      [tokens, status](grpc::ServerContext&, const v1::ResolvedRequest& request, Writer& writer) {
        Go(request, writer, tokens);
        return status;
      };
}

TEST_F(StreamRelayTest, AStreamCutBehindAnyTokenGoesOn) {
  std::vector<ScriptedWorker::Act> script{Whole};
  for (uint64_t cut = 0; cut < 10; ++cut) {
    script.push_back(DieBehind(cut));
    script.push_back(Whole);
  }
  ScriptedWorker& worker = Worker(script);
  const std::string text = Generate(Request()).text;
  EXPECT_FALSE(text.empty());
  std::set<uint64_t> numbers;
  for (uint64_t cut = 0; cut < 10; ++cut) {
    SCOPED_TRACE(cut);
    const Stream stream = Generate(Request());
    ASSERT_NO_FATAL_FAILURE(ExpectWhole(stream));
    EXPECT_EQ(stream.text, text) << "no code point is lost where the stream was cut";
    EXPECT_FALSE(stream.events.back().inexact());
    EXPECT_EQ(stream.events[0].numerics_class(), "/cpu");
    const v1::ResolvedRequest replay = worker.requests().back();
    ASSERT_EQ(replay.generated_size(), static_cast<int>(cut));
    for (uint64_t i = 0; i < cut; ++i) EXPECT_EQ(replay.generated(static_cast<int>(i)), TokenAt(i));
    EXPECT_EQ(replay.prompt_size(), 3);
    EXPECT_EQ(replay.max_tokens(), 10u);
    EXPECT_EQ(replay.seed(), 11u);
    EXPECT_GT(replay.deadline_ms(), 0);
  }
  for (const v1::ResolvedRequest& request : worker.requests()) {
    EXPECT_TRUE(numbers.insert(request.request()).second) << "each attempt has its own number";
  }
  const auto counters = Counters();
  EXPECT_EQ(counters.at("requests"), 11u);
  EXPECT_EQ(counters.at("requests_replayed"), 10u);
  EXPECT_EQ(counters.at("tokens_replayed"), 45u);
  EXPECT_EQ(counters.at("tokens_out"), 110u);
}

TEST_F(StreamRelayTest, AnotherWorkerIsAskedRatherThanTheOneThatFailed) {
  ScriptedWorker& first = Worker({DieBehind(4)});
  ScriptedWorker& second = Worker({Whole});
  ExpectWhole(Generate(Request()));
  EXPECT_GE(first.requests().size(), 1u);
  ASSERT_EQ(second.requests().size(), 1u);
  EXPECT_EQ(second.requests()[0].generated_size(), 4);
}

TEST_F(StreamRelayTest, AnyEndThatIsNotTheRequestsIsReplaced) {
  for (const grpc::StatusCode code :
       {grpc::StatusCode::UNAVAILABLE, grpc::StatusCode::INTERNAL, grpc::StatusCode::UNKNOWN,
        grpc::StatusCode::ABORTED, grpc::StatusCode::UNIMPLEMENTED, grpc::StatusCode::OK}) {
    SCOPED_TRACE(code);
    OnlyWorker({DieBehind(3, grpc::Status(code, code == grpc::StatusCode::OK ? "" : "oh")), Whole});
    ExpectWhole(Generate(Request()));
  }
}

TEST_F(StreamRelayTest, ASilentWorkerIsGivenUp) {
  Start(/*silence_ms=*/300);
  Worker({[](grpc::ServerContext& context, const v1::ResolvedRequest& request, Writer& writer) {
            Go(request, writer, 4);
            AwaitCancellation(context);
            return grpc::Status::CANCELLED;
          },
          Whole});
  ExpectWhole(Generate(Request()));
  EXPECT_GE(Counters().at("workers_silent"), 1u);
}

TEST_F(StreamRelayTest, AWorkerThatOnlyBeatsIsAlive) {
  Start(/*silence_ms=*/1500);
  Worker({[](grpc::ServerContext&, const v1::ResolvedRequest& request, Writer& writer) {
    std::mutex mutex;
    std::condition_variable never;
    std::unique_lock<std::mutex> lock(mutex);
    for (int i = 0; i < 30; ++i) {
      writer.Write(Beat());
      never.wait_for(lock, std::chrono::milliseconds(70));
    }
    Go(request, writer, 10, true);
    return grpc::Status::OK;
  }});
  ExpectWhole(Generate(Request()));
  EXPECT_EQ(Counters().at("workers_silent"), 0u);
}

TEST_F(StreamRelayTest, ATokenOutOfOrderIsNotPassedOn) {
  for (const uint64_t wrong : {2u, 4u, 99u}) {
    SCOPED_TRACE(wrong);
    OnlyWorker(
        {[wrong](grpc::ServerContext& context, const v1::ResolvedRequest& request, Writer& writer) {
           Go(request, writer, 3);
           writer.Write(Token(wrong));
           AwaitCancellation(context);
           return grpc::Status::CANCELLED;
         },
         Whole});
    ExpectWhole(Generate(Request()));
  }
}

TEST_F(StreamRelayTest, DeathBehindTheLastEventIsNoDeath) {
  Worker({[](grpc::ServerContext&, const v1::ResolvedRequest& request, Writer& writer) {
    Go(request, writer, 10, true);
    return kGone;
  }});
  ExpectWhole(Generate(Request()));
  EXPECT_EQ(workers_[0]->requests().size(), 1u);
}

TEST_F(StreamRelayTest, ARequestThatEndsThreeWorkersFails) {
  ScriptedWorker& worker = Worker({DieBehind(2), DieBehind(2), DieBehind(2), Whole});
  const Stream stream = Generate(Request());
  EXPECT_EQ(stream.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_TRUE(absl::StartsWith(stream.status.error_message(), "request: 3 workers"));
  EXPECT_EQ(stream.events.size(), 2u);
  EXPECT_EQ(worker.requests().size(), 3u);
  EXPECT_EQ(Counters().at("requests_poisonous"), 1u);
  EXPECT_EQ(Counters().at("in_flight"), 0u);
}

TEST_F(StreamRelayTest, ARefusalOfTheRequestIsPassedOn) {
  for (const grpc::StatusCode code :
       {grpc::StatusCode::INVALID_ARGUMENT, grpc::StatusCode::OUT_OF_RANGE,
        grpc::StatusCode::RESOURCE_EXHAUSTED, grpc::StatusCode::CANCELLED}) {
    SCOPED_TRACE(code);
    ScriptedWorker& worker =
        OnlyWorker({[code](grpc::ServerContext&, const v1::ResolvedRequest&, Writer& writer) {
          writer.Write(Beat());  // as every worker does before it looks at a request
          return grpc::Status(code, "max_tokens: too much");
        }});
    const Stream stream = Generate(Request());
    EXPECT_EQ(stream.status.error_code(), code);
    EXPECT_EQ(stream.status.error_message(), "max_tokens: too much");
    EXPECT_EQ(worker.requests().size(), 1u);
  }
}

TEST_F(StreamRelayTest, AWorkerThatDrainsIsNoDeath) {
  const auto drains = [](grpc::ServerContext&, const v1::ResolvedRequest&, Writer& writer) {
    writer.Write(Beat());
    return grpc::Status(grpc::StatusCode::ABORTED, "this worker is draining");
  };
  Worker({drains, drains, drains, drains, drains, Whole});
  ExpectWhole(Generate(Request()));
}

TEST_F(StreamRelayTest, AFullWorkerEndsNoStreamThatHasBegun) {
  const auto full = [](grpc::ServerContext&, const v1::ResolvedRequest&, Writer&) {
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "too many requests are waiting");
  };
  Worker({DieBehind(5), full, full, Whole});
  ExpectWhole(Generate(Request()));
}

TEST_F(StreamRelayTest, ADeadlineThatPassesWithoutAWorkerIsToldByTheGateway) {
  Worker({DieBehind(5),
          [](grpc::ServerContext&, const v1::ResolvedRequest&, Writer&) { return kGone; }});
  v1::GenerateRequest request = Request();
  request.set_deadline_ms(2000);
  const Stream stream = Generate(request);
  EXPECT_EQ(stream.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(absl::StartsWith(stream.status.error_message(), "deadline_ms:"));
  ASSERT_EQ(stream.events.size(), 6u);
  EXPECT_FALSE(stream.events.back().has_token());
  EXPECT_EQ(stream.events.back().finish_reason(), v1::FINISH_REASON_DEADLINE);
  EXPECT_EQ(stream.events.back().usage().completion_tokens(), 5u);
}

TEST_F(StreamRelayTest, ANewRequestWaitsForAWorker) {
  auto stream = std::async(std::launch::async, [&] { return Generate(Request()); });
  Worker({Whole});
  ExpectWhole(stream.get());
}

TEST_F(StreamRelayTest, AnotherArithmeticIsSaidToBeOne) {
  Worker({DieBehind(4),
          [](grpc::ServerContext&, const v1::ResolvedRequest&, Writer&) { return kGone; }});
  ScriptedWorker& other = Worker({Whole}, "gpu");
  const Stream stream = Generate(Request());
  ASSERT_NO_FATAL_FAILURE(ExpectWhole(stream));
  for (uint64_t i = 0; i < 10; ++i) {
    EXPECT_EQ(stream.events[i].inexact(), i >= 4);
    EXPECT_EQ(stream.events[i].numerics_class(), i == 0 ? "/cpu" : i == 4 ? "/gpu" : "");
  }
  EXPECT_EQ(other.requests().size(), 1u);
  EXPECT_EQ(Counters().at("requests_inexact"), 1u);
}

TEST_F(StreamRelayTest, AStreamGoesOnAtAnotherGateway) {
  Worker({Whole});
  const Stream whole = Generate(Request());
  for (uint64_t have = 0; have < 10; ++have) {
    SCOPED_TRACE(have);
    v1::GenerateRequest request = Request();
    std::string text;
    for (uint64_t i = 0; i < have; ++i) {
      request.mutable_resume()->add_token_ids(TokenAt(i));
      text += whole.events[i].text();
    }
    const Stream rest = Generate(request);
    ExpectWhole(rest, have);
    EXPECT_EQ(text + rest.text, whole.text);
  }
  v1::GenerateRequest request = Request();
  for (uint64_t i = 0; i < 11; ++i) request.mutable_resume()->add_token_ids(TokenAt(i));
  EXPECT_TRUE(absl::StartsWith(Generate(request).status.error_message(), "resume.token_ids: 11"));
  request.mutable_resume()->mutable_token_ids()->Resize(2, 0);
  request.mutable_resume()->set_token_ids(1, 4096);
  EXPECT_TRUE(absl::StartsWith(Generate(request).status.error_message(), "resume.token_ids[1]:"));
  request.mutable_resume()->set_token_ids(1, 5);
  request.mutable_resume()->set_numerics_class("\x1b[2J\n");
  EXPECT_TRUE(absl::StartsWith(Generate(request).status.error_message(), "resume.numerics_class:"));
  request.mutable_resume()->set_numerics_class("0123/cpu");
  EXPECT_EQ(Generate(request).status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(StreamRelayTest, WhatWasInexactStaysSo) {
  Worker({Whole});
  v1::GenerateRequest request = Request();
  request.mutable_resume()->add_token_ids(TokenAt(0));
  request.mutable_resume()->set_inexact(true);
  const Stream rest = Generate(request);
  ASSERT_NO_FATAL_FAILURE(ExpectWhole(rest, 1));
  EXPECT_TRUE(rest.events[0].inexact());
}

TEST_F(StreamRelayTest, AFullWorkerIsNotKeptFromOthers) {
  // It refuses those that have begun and takes new ones.
  std::atomic<int> refused{0};
  Worker({[&](grpc::ServerContext&, const v1::ResolvedRequest& request, Writer& writer) {
    if (request.generated_size() > 0 && ++refused < 4) {
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "too many requests are waiting");
    }
    Go(request, writer, 10, true);
    return grpc::Status::OK;
  }});
  v1::GenerateRequest begun = Request();
  begun.mutable_resume()->add_token_ids(TokenAt(0));
  auto waiting = std::async(std::launch::async, [&] { return Generate(begun); });
  ExpectWhole(Generate(Request()));
  ExpectWhole(waiting.get(), 1);
  EXPECT_EQ(refused, 4);
}

TEST_F(StreamRelayTest, AScoreIsMadeAgainFromItsBeginning) {
  Worker({Whole});
  v1::ScoreRequest request;
  for (int32_t id = 3; id < 10; ++id) request.mutable_token_ids()->add_ids(id);
  grpc::ClientContext context;
  v1::ScoreReply reply;
  const grpc::Status status = stub_->Score(&context, request, &reply);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(reply.positions_size(), 7);
  for (int i = 0; i < 7; ++i) {
    EXPECT_EQ(reply.positions(i).row_digest(), static_cast<uint64_t>(i));
  }
}

}  // namespace
}  // namespace moebius::services
