// Goal: what an operator's tools rely on: grpc.health.v1 says SERVING exactly while a token can be
// made, and reflection describes every service. Method: processes started one after another, asked
// over the wire in raw bytes (no generated code of either service is at hand here).

#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/unknown_field_set.h>
#include <signal.h>

#include <set>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/services/process_cluster.h"
#include "tests/services/raw_call.h"

namespace moebius::services {
namespace {

constexpr char kCheck[] = "/grpc.health.v1.Health/Check";
constexpr char kWatch[] = "/grpc.health.v1.Health/Watch";
constexpr char kReflection[] = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

// HealthCheckResponse { ServingStatus status = 1; }
const std::string kServing("\x08\x01", 2);
const std::string kNotServing("\x08\x02", 2);

std::shared_ptr<grpc::Channel> Open(const std::string& address) {
  return grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
}

std::string Check(const std::shared_ptr<grpc::Channel>& channel) {
  const RawReply reply = RawCall(channel, kCheck, "");  // no service name: the whole server
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  return reply.bytes;
}

// Length-delimited fields numbered `field` of an encoded message.
std::vector<std::string> Fields(const std::string& bytes, int field) {
  google::protobuf::UnknownFieldSet set;
  EXPECT_TRUE(set.ParseFromString(bytes));
  std::vector<std::string> found;
  for (int i = 0; i < set.field_count(); ++i) {
    if (set.field(i).number() == field &&
        set.field(i).type() == google::protobuf::UnknownField::TYPE_LENGTH_DELIMITED)
      found.push_back(set.field(i).length_delimited());
  }
  return found;
}

// ServerReflectionRequest with one string field; the answer's fields are read by number.
std::string Reflect(const std::shared_ptr<grpc::Channel>& channel, int field,
                    const std::string& value) {
  RawStream stream(channel, kReflection,
                   absl::StrCat(std::string(1, static_cast<char>(field << 3 | 2)),
                                std::string(1, static_cast<char>(value.size())), value));
  const std::optional<std::string> reply = stream.Read();
  EXPECT_TRUE(reply.has_value());
  return reply.value_or("");
}

std::set<std::string> ListServices(const std::shared_ptr<grpc::Channel>& channel) {
  std::set<std::string> names;
  for (const std::string& list : Fields(Reflect(channel, 7, ""), 6)) {
    for (const std::string& service : Fields(list, 1)) names.insert(Fields(service, 1).at(0));
  }
  return names;
}

class HealthAndReflection : public testing::Test {
 protected:
  ServiceProcess& Start(std::unique_ptr<ServiceProcess>& slot, const std::string& role,
                        std::vector<std::string> flags) {
    slot = std::make_unique<ServiceProcess>(folder_, role, "moebius-" + role, std::move(flags));
    return *slot;
  }
  ScopedFolder folder_;
  std::unique_ptr<ServiceProcess> controller_, gateway_, attention_, expert_;
};

TEST_F(HealthAndReflection, ServingMeansThatATokenCanBeMadeNow) {
  const auto controller = Start(controller_, "controller", {}).Address();
  ASSERT_TRUE(controller.ok()) << controller.status();
  EXPECT_EQ(Check(Open(*controller)), kServing) << "the controller serves once it listens";
  const std::vector<std::string> flags{"--controller", *controller};
  const auto gateway = Start(gateway_, "gateway", flags).Address();
  ASSERT_TRUE(gateway.ok()) << gateway.status();
  const std::shared_ptr<grpc::Channel> channel = Open(*gateway);
  EXPECT_EQ(Check(channel), kNotServing);
  RawStream watch(channel, kWatch, "");
  EXPECT_EQ(watch.Read(), kNotServing);
  ClientFlags client_flags;
  client_flags.address = *gateway;
  const std::unique_ptr<GenerationClient> client = *GenerationClient::Open(client_flags);
  EXPECT_EQ(Generate(*client, MakeRequest(1)).status.code(), absl::StatusCode::kUnavailable);

  const auto attention = Start(attention_, "attention", flags).Address();
  ASSERT_TRUE(attention.ok()) << attention.status();
  EXPECT_EQ(Check(Open(*attention)), kNotServing) << "no experts yet";
  AwaitCounters(*gateway, [](const auto& counters) {
    for (const auto& [name, value] : counters) {
      if (name.rfind("attention/", 0) == 0) return true;
    }
    return false;
  });
  EXPECT_EQ(Check(channel), kNotServing) << "an attention worker alone makes no token";
  EXPECT_EQ(Generate(*client, MakeRequest(1)).status.code(), absl::StatusCode::kUnavailable);

  const auto expert = Start(expert_, "expert", flags).Address();
  ASSERT_TRUE(expert.ok()) << expert.status();
  EXPECT_EQ(watch.Read(), kServing) << "told without being asked again";
  const Result result = Generate(*client, MakeRequest(1));
  EXPECT_TRUE(result.status.ok()) << "at once: " << result.status;
  EXPECT_EQ(Check(channel), kServing);
  EXPECT_EQ(Check(Open(*attention)), kServing);
  EXPECT_EQ(Check(Open(*expert)), kServing);

  // Without its only host of experts it says so, and again when another one has come.
  expert_->Signal(SIGKILL);
  EXPECT_EQ(watch.Read(), kNotServing);
  EXPECT_EQ(Check(channel), kNotServing);
  ASSERT_TRUE(Start(expert_, "expert", flags).Address().ok());
  EXPECT_EQ(watch.Read(), kServing);
  EXPECT_TRUE(Generate(*client, MakeRequest(1)).status.ok());

  // A draining worker is not ready, and stays so while it finishes what is aboard, whatever it
  // hears of the cluster meanwhile. Nobody is left then, and the gateway says so too.
  RawStream attention_watch(Open(*attention), kWatch, "");
  EXPECT_EQ(attention_watch.Read(), kServing);
  RawStream stream(channel, "/moebius.v1.Generation/Generate",
                   MakeRequest(1, 400).SerializeAsString());
  ASSERT_TRUE(stream.Read().has_value());
  attention_->Signal(SIGTERM);
  EXPECT_EQ(watch.Read(), kNotServing);
  int tokens = 1;
  while (stream.Read()) ++tokens;
  EXPECT_EQ(tokens, 400);
  EXPECT_TRUE(stream.Finish().ok());
  EXPECT_EQ(attention_watch.Read(), kNotServing);
  EXPECT_EQ(attention_watch.Read(), std::nullopt) << "ended with the worker, without another word";
  EXPECT_EQ(attention_->Wait(), 0);
  gateway_->Signal(SIGTERM);
  EXPECT_EQ(gateway_->Wait(), 0);
}

TEST_F(HealthAndReflection, AnUnknownServiceIsNotFound) {
  const auto controller = Start(controller_, "controller", {}).Address();
  ASSERT_TRUE(controller.ok()) << controller.status();
  const std::string nobody = "\x0A\x06nobody";
  EXPECT_EQ(RawCall(Open(*controller), kCheck, nobody).status.error_code(),
            grpc::StatusCode::NOT_FOUND);
  // Watch must tell SERVICE_UNKNOWN (3) instead, and stay.
  EXPECT_EQ(RawStream(Open(*controller), kWatch, nobody).Read(), std::string("\x08\x03", 2));
}

TEST_F(HealthAndReflection, EveryServiceDescribesItself) {
  const auto controller = Start(controller_, "controller", {}).Address();
  ASSERT_TRUE(controller.ok()) << controller.status();
  const auto gateway = Start(gateway_, "gateway", {"--controller", *controller}).Address();
  ASSERT_TRUE(gateway.ok()) << gateway.status();
  const std::shared_ptr<grpc::Channel> channel = Open(*gateway);
  const std::set<std::string> both{"grpc.health.v1.Health",
                                   "grpc.reflection.v1alpha.ServerReflection"};
  std::set<std::string> expected = both;
  expected.insert({"moebius.v1.Generation", "moebius.v1.StatusService"});
  EXPECT_EQ(ListServices(channel), expected);
  expected = both;
  expected.insert("moebius.v1.Control");
  EXPECT_EQ(ListServices(Open(*controller)), expected);

  // file_containing_symbol: the file that a client builds its request from.
  google::protobuf::FileDescriptorProto file;
  bool found = false;
  for (const std::string& reply : Fields(Reflect(channel, 4, "moebius.v1.Generation"), 4)) {
    for (const std::string& bytes : Fields(reply, 1)) {
      ASSERT_TRUE(file.ParseFromString(bytes));
      if (file.name() != "moebius/v1/generation.proto") continue;
      found = true;
      ASSERT_EQ(file.service_size(), 1);
      EXPECT_EQ(file.service(0).method(0).name(), "Generate");
      EXPECT_TRUE(file.service(0).method(0).server_streaming());
    }
  }
  EXPECT_TRUE(found);
  EXPECT_EQ(Fields(Reflect(channel, 4, "moebius.v1.Nobody"), 7).size(), 1u) << "error_response";
}

}  // namespace
}  // namespace moebius::services
