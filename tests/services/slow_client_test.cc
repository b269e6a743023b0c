// Goal: a client that does not read is cut off with CANCELLED, holds no cache block, worker or
// place at the gateway any longer than that, and slows nobody. Method: a stream that is opened and
// not read, with a small HTTP/2 window, at the gateway and at a worker; others run beside it.

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/file_io.h"
#include "moebius/v1/worker.grpc.pb.h"
#include "tests/services/process_cluster.h"
#include "tests/services/raw_call.h"

namespace moebius::services {
namespace {

constexpr int kTokens = 20'000;  // far more than all buffers on the way hold

// Takes no more from the wire than it reads.
std::shared_ptr<grpc::Channel> NarrowChannel(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1024);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

v1::GenerateRequest ShortRequest(int i) {
  v1::GenerateRequest request;
  for (int k = 0; k < 5 + i; ++k) request.mutable_token_ids()->add_ids(3 + (i * 31 + k * 7) % 250);
  request.set_max_tokens(100);
  request.set_ignore_eos(true);
  return request;
}

ScopedCluster* Start(const std::string& stall_ms, const std::string& lag) {
  LocalClusterOptions options;
  options.model = kRandomModel;
  options.num_blocks = 400;
  options.role_flags = {{"gateway", {"--write-stall-ms", stall_ms}},
                        {"attention", {"--stream-lag", lag}}};
  return new ScopedCluster(options);
}

void ExpectOthersUnharmed(ScopedCluster& cluster) {
  const std::unique_ptr<GenerationClient> one = OneProcess(kRandomModel);
  const std::unique_ptr<GenerationClient> client = cluster.Client();
  for (int i = 0; i < 4; ++i) {
    const Result expected = Generate(*one, ShortRequest(i));
    EXPECT_EQ(expected.ids.size(), 100u);
    ExpectSame(Generate(*client, ShortRequest(i)), expected, absl::StrCat("beside it, ", i));
  }
}

uint64_t CounterOf(const std::map<std::string, uint64_t>& counters, const std::string& name) {
  const auto it = counters.find(name);
  return it == counters.end() ? 0 : it->second;
}

TEST(SlowClient, TheGatewayCutsItOff) {
  // The worker's queue is never the limit here.
  const std::unique_ptr<ScopedCluster> cluster(Start("1500", "1000000"));
  const std::string address = (*cluster)->address();
  v1::GenerateRequest request = ShortRequest(9);
  request.set_max_tokens(kTokens);
  RawStream stream(NarrowChannel(address), "/moebius.v1.Generation/Generate",
                   request.SerializeAsString());
  // Its write is stuck soon: the worker makes tokens that no longer come through the gateway.
  AwaitCounters(address, [](const auto& counters) {
    return SumOf(counters, "/tokens_out") > CounterOf(counters, "tokens_out") + 300;
  });
  ExpectOthersUnharmed(*cluster);
  const auto freed = AwaitCounters(
      address, [](const auto& counters) { return CounterOf(counters, "in_flight") == 0; });
  EXPECT_EQ(CounterOf(freed, "slow_clients_cut"), 1u);
  AwaitCounters(address, [](const auto& counters) { return SumOf(counters, "/blocks_used") == 0; });
  int tokens = 0;
  while (stream.Read()) ++tokens;
  EXPECT_LT(tokens, kTokens);
  EXPECT_EQ(stream.Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(CounterOf(cluster->Counters(), "slow_clients_cut"), 1u) << "nobody else";
  ExpectOthersUnharmed(*cluster);
}

TEST(SlowClient, TheWorkersQueueCutsItOff) {
  // The gateway waits for ever here; a gateway that hangs is a worker's slow client.
  const std::unique_ptr<ScopedCluster> cluster(Start("86400000", "1000"));
  const std::string address = (*cluster)->address();
  std::string worker;
  for (const auto& process : (*cluster)->processes()) {
    if (process.name == "attention-0") worker = *model::ReadSmallFile(process.port_file, 256);
  }
  v1::ResolvedRequest request;
  request.set_request(1);
  *request.mutable_prompt() = ShortRequest(9).token_ids().ids();
  request.set_max_tokens(kTokens);
  request.set_top_p(1);
  request.set_ignore_eos(true);
  RawStream stream(NarrowChannel(worker), "/moebius.v1.AttentionService/Generate",
                   request.SerializeAsString());
  ASSERT_TRUE(stream.Read().has_value()) << stream.Finish().error_message();
  ExpectOthersUnharmed(*cluster);
  AwaitCounters(worker, [](const auto& counters) {
    return CounterOf(counters, "running") == 0 && CounterOf(counters, "blocks_used") == 0;
  });
  EXPECT_LT(CounterOf(Counters(worker), "tokens_out"), static_cast<uint64_t>(kTokens))
      << "cut off, not finished";
  int tokens = 1;
  while (stream.Read()) ++tokens;
  EXPECT_LT(tokens, kTokens);
  EXPECT_EQ(stream.Finish().error_code(), grpc::StatusCode::CANCELLED);
  ExpectOthersUnharmed(*cluster);
}

}  // namespace
}  // namespace moebius::services
