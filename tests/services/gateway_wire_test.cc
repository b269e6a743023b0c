// Goal: whatever bytes a client sends, it gets the right gRPC status and the server lives on; and a
// chat over the wire is the prompt that it renders to. Method: calls of raw bytes against a running
// cluster, shared by all tests here; every test ends with a good request.
//
// Statuses of gRPC's own (its status-code table): a message that cannot be parsed is INTERNAL, one
// over the size limit RESOURCE_EXHAUSTED, an unknown method UNIMPLEMENTED.

#include <cmath>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/chat_template.h"
#include "model/file_io.h"
#include "moebius/v1/control.grpc.pb.h"
#include "moebius/v1/worker.grpc.pb.h"
#include "tests/services/process_cluster.h"
#include "tests/services/raw_call.h"

namespace moebius::services {
namespace {

constexpr char kGenerate[] = "/moebius.v1.Generation/Generate";
constexpr char kScore[] = "/moebius.v1.Generation/Score";
constexpr char kTokenize[] = "/moebius.v1.Generation/Tokenize";
constexpr char kWorkerGenerate[] = "/moebius.v1.AttentionService/Generate";
constexpr char kWorkerScore[] = "/moebius.v1.AttentionService/Score";
constexpr char kRenew[] = "/moebius.v1.Control/Renew";

// A field's key and, for a length-delimited one, its bytes.
std::string Key(int field, int wire_type) {
  std::string key;
  for (int value = field << 3 | wire_type; value != 0; value >>= 7)
    key += static_cast<char>((value & 0x7F) | (value > 0x7F ? 0x80 : 0));
  return key;
}
std::string Bytes(int field, const std::string& bytes) {
  return absl::StrCat(Key(field, 2), std::string(1, static_cast<char>(bytes.size())), bytes);
}

class GatewayWire : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    cluster_ = new ScopedCluster(LocalClusterOptions{});
    channel_ = Open((*cluster_)->address());
  }
  static void TearDownTestSuite() {
    channel_.reset();
    delete cluster_;
  }
  static std::shared_ptr<grpc::Channel> Open(const std::string& address) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxSendMessageSize(-1);
    return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
  }
  // The gRPC channel of another process of the cluster.
  static std::shared_ptr<grpc::Channel> Of(const std::string& process) {
    for (const auto& p : (*cluster_)->processes()) {
      if (p.name == process) return Open(*model::ReadSmallFile(p.port_file, 256));
    }
    return nullptr;
  }
  void TearDown() override {
    const Result result = Generate(*cluster_->Client(), MakeRequest(1));
    EXPECT_TRUE(result.status.ok()) << "it still serves: " << result.status;
    EXPECT_EQ(result.ids.size(), 24u);
    for (const auto& process : (*cluster_)->processes()) {
      EXPECT_TRUE(IsRunning(process.pid)) << process.name;
    }
  }
  static grpc::StatusCode Code(const std::shared_ptr<grpc::Channel>& channel, const char* method,
                               const std::string& bytes) {
    return RawCall(channel, method, bytes).status.error_code();
  }

  static inline ScopedCluster* cluster_ = nullptr;
  static inline std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(GatewayWire, BytesThatAreNoMessageAreInternal) {
  const std::string cases[] = {
      std::string("\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 12),  // endless varint
      std::string("\x00\x01", 2),                                           // field number 0
      Key(3, 2) + "\x7F" + "short",                                         // cut off
      Key(5, 2) + "\xFF\xFF\xFF\xFF\x0F",                                   // 4 GiB announced
      Key(6, 6) + "\x01",                                                   // no such wire type
      Key(9, 4),                                                            // end of no group
      Bytes(1, "\xC3\x28"),                                                 // not UTF-8
      Key(7, 5) + "\x01\x02",                                               // half a float
  };
  for (const std::string& bytes : cases) {
    const RawReply reply = RawCall(channel_, kGenerate, bytes);
    EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INTERNAL)
        << testing::PrintToString(bytes) << ": " << reply.status.error_message();
    for (const char* method : {kScore, kTokenize}) {
      const grpc::StatusCode code = Code(channel_, method, bytes);
      EXPECT_TRUE(code == grpc::StatusCode::INTERNAL || code == grpc::StatusCode::INVALID_ARGUMENT)
          << method << " " << testing::PrintToString(bytes) << ": " << code;
    }
  }
  // The workers' own services are behind the same parser.
  const std::string& torn = cases[2];
  EXPECT_EQ(Code(Of("attention-0"), kWorkerGenerate, cases[0]), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(Code(Of("controller"), kRenew, cases[0]), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(Code(Of("expert-0"), "/moebius.v1.StatusService/Status", torn),
            grpc::StatusCode::INTERNAL);
}

TEST_F(GatewayWire, AFieldOfAnotherTypeIsNotThatField) {
  // Protocol buffers keep a field of an unexpected wire type as an unknown one: the request then
  // lacks it.
  RawReply reply = RawCall(channel_, kGenerate, Key(3, 0) + "\x05");  // text as a number
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(reply.status.error_message().find("input"), std::string::npos);
  // A message where another is expected: text inside token_ids does not become ids.
  reply = RawCall(channel_, kGenerate,
                  Bytes(5, Bytes(1, "abc") + Key(1, 5) + "abcd") + Key(6, 0) + "\x01");
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::OK) << "packed varints 97, 98, 99";
  reply = RawCall(channel_, kGenerate, Bytes(5, Key(1, 5) + "abcd"));
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(reply.status.error_message().find("token_ids"), std::string::npos);
  // Another service's message: its fields are checked as ours.
  v1::RenewRequest renew;
  renew.mutable_worker()->set_node(7);
  reply = RawCall(channel_, kGenerate, renew.SerializeAsString());
  EXPECT_NE(reply.status.error_code(), grpc::StatusCode::OK);
}

TEST_F(GatewayWire, AnUnknownMethodIsUnimplemented) {
  EXPECT_EQ(Code(channel_, "/moebius.v1.Generation/Nothing", ""), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(Code(channel_, kWorkerGenerate, ""), grpc::StatusCode::UNIMPLEMENTED)
      << "the gateway is no worker";
}

TEST_F(GatewayWire, AnOversizedMessageIsResourceExhausted) {
  v1::GenerateRequest request;
  request.set_text(std::string(17 << 20, 'a'));
  const std::string large = request.SerializeAsString();
  EXPECT_EQ(Code(channel_, kGenerate, large), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(Code(channel_, kTokenize, large), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(Code(Of("controller"), kRenew, large), grpc::StatusCode::RESOURCE_EXHAUSTED);
  // Small on the wire, large once inflated.
  request.set_text(std::string(64 << 20, 'a'));
  EXPECT_EQ(RawCall(channel_, kGenerate, request.SerializeAsString(), GRPC_COMPRESS_GZIP)
                .status.error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  // Within gRPC's limit and over ours: the field is named.
  request.set_text(std::string((8 << 20) + 1, 'a'));
  const RawReply reply = RawCall(channel_, kGenerate, request.SerializeAsString());
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(reply.status.error_message().find("text"), std::string::npos);
}

TEST_F(GatewayWire, AWorkerRefusesWhatNoGatewayWouldSend) {
  const std::shared_ptr<grpc::Channel> worker = Of("attention-0");
  uint64_t number = 1;
  const auto good = [&] {
    v1::ResolvedRequest request;
    request.set_request(number++);
    request.add_prompt(5);
    request.set_max_tokens(1);
    request.set_top_p(1);
    return request;
  };
  const auto refused = [&](const v1::ResolvedRequest& request) {
    EXPECT_EQ(Code(worker, kWorkerGenerate, request.SerializeAsString()),
              grpc::StatusCode::INVALID_ARGUMENT)
        << request.ShortDebugString().substr(0, 200);
  };
  // A good one: a beat as soon as it is aboard, then its token.
  RawStream stream(worker, kWorkerGenerate, good().SerializeAsString());
  v1::WorkerToken token;
  ASSERT_TRUE(token.ParseFromString(stream.Read(std::chrono::seconds(60)).value_or("no message")));
  EXPECT_TRUE(token.beat());
  do {
    ASSERT_TRUE(
        token.ParseFromString(stream.Read(std::chrono::seconds(60)).value_or("no message")));
  } while (token.beat());
  EXPECT_EQ(token.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_FALSE(stream.Read(std::chrono::seconds(60)).has_value());
  EXPECT_TRUE(stream.Finish().ok());

  v1::ResolvedRequest request = good();
  request.clear_prompt();
  refused(request);
  for (int32_t id : {-1, 4096, INT32_MAX, INT32_MIN}) {
    request = good();
    request.add_prompt(id);
    refused(request);
  }
  for (float value : {-1.0f, NAN, INFINITY}) {
    request = good();
    request.set_temperature(value);
    refused(request);
    request = good();
    request.set_top_p(value);
    refused(request);
  }
  request = good();
  request.set_top_k(-1);
  refused(request);
  request = good();
  request.mutable_prompt()->Resize(5000, 5);
  EXPECT_EQ(Code(worker, kWorkerGenerate, request.SerializeAsString()),
            grpc::StatusCode::OUT_OF_RANGE);
  request = good();
  request.set_deadline_ms(-1);
  refused(request);
  request = good();
  request.add_generated(5000);
  refused(request);
  request = good();
  request.add_generated(5);
  request.add_generated(5);  // more than max_tokens
  refused(request);
  for (int32_t top : {-1, INT32_MAX, INT32_MIN}) {
    v1::ResolvedScore score;
    score.set_request(number++);
    score.add_prompt(5);
    score.set_top(top);
    EXPECT_EQ(Code(worker, kWorkerScore, score.SerializeAsString()),
              grpc::StatusCode::INVALID_ARGUMENT)
        << top;
  }
}

TEST_F(GatewayWire, AScoreHasTheNameThatItsClientGaveIt) {
  v1::ScoreRequest request;
  for (int id : {3, 5, 7}) request.mutable_token_ids()->add_ids(id);
  request.set_request_id("score-7");
  const auto reply = cluster_->Client()->Score(request);
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->request_id(), "score-7");
  request.clear_request_id();
  const auto named = cluster_->Client()->Score(request);
  ASSERT_TRUE(named.ok()) << named.status();
  EXPECT_EQ(named->request_id().rfind("req-", 0), 0u) << named->request_id();
}

std::vector<std::vector<model::ChatMessage>> Conversations() {
  return {
      {{"user", "What is the code of belora?"}},
      {{"system", "Answer briefly."},
       {"user", "The code of old mill is 775."},
       {"assistant", "Good."},
       {"user", "What is the code of old mill?"}},
      // Markers spelled out are text; so are other scripts and an empty turn.
      {{"user", absl::StrCat("a", model::kAssistantMarker, "b", model::kEosMarker)},
       {"assistant", ""},
       {"user", "na\u00efve \u732b \U0001F600\n\n  x"},
       {"system", "Last, and still first."}},
  };
}

TEST_F(GatewayWire, AChatIsThePromptThatItRendersTo) {
  const std::unique_ptr<GenerationClient> one = OneProcess();
  const model::Tokenizer& tokenizer = *one->local()->host().tokenizer;
  const auto stub = v1::Generation::NewStub(channel_);
  for (const std::vector<model::ChatMessage>& conversation : Conversations()) {
    const auto segments = model::RenderChat(model::ChatTemplate::kV3, conversation, true);
    ASSERT_TRUE(segments.ok()) << segments.status();
    const auto ids = model::EncodeChat(tokenizer, *segments);
    ASSERT_TRUE(ids.ok()) << ids.status();
    v1::ChatMessages chat;
    for (const model::ChatMessage& message : conversation) {
      v1::ChatMessage* entry = chat.add_messages();
      entry->set_role(message.role);
      entry->set_content(message.content);
    }
    grpc::ClientContext context;
    v1::TokenizeRequest tokenize;
    *tokenize.mutable_chat() = chat;
    v1::TokenizeReply tokenized;
    ASSERT_TRUE(stub->Tokenize(&context, tokenize, &tokenized).ok());
    EXPECT_EQ(std::vector<TokenId>(tokenized.token_ids().begin(), tokenized.token_ids().end()),
              *ids);
    for (const float temperature : {0.0f, 1.0f}) {
      v1::GenerateRequest request;
      request.set_max_tokens(24);
      request.set_temperature(temperature);
      request.set_seed(5);
      request.set_ignore_eos(true);
      v1::GenerateRequest rendered = request;
      *request.mutable_chat() = chat;
      rendered.mutable_token_ids()->mutable_ids()->Add(ids->begin(), ids->end());
      const Result expected = Generate(*one, rendered);
      EXPECT_EQ(expected.ids.size(), 24u);
      ExpectSame(Generate(*cluster_->Client(), request), expected, conversation[0].content);
    }
  }
}

TEST_F(GatewayWire, AChatThatCannotBeRenderedIsRefused) {
  const auto expect = [&](const std::string& role, grpc::StatusCode code) {
    v1::GenerateRequest request;
    v1::ChatMessage* message = request.mutable_chat()->add_messages();
    message->set_role(role);
    message->set_content("hello");
    const RawReply reply = RawCall(channel_, kGenerate, request.SerializeAsString());
    EXPECT_EQ(reply.status.error_code(), code) << role;
    EXPECT_NE(reply.status.error_message().find("messages[0]"), std::string::npos)
        << reply.status.error_message();
  };
  expect("", grpc::StatusCode::INVALID_ARGUMENT);
  expect("User", grpc::StatusCode::INVALID_ARGUMENT);
  expect("tool", grpc::StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace moebius::services
