#pragma once

// One way to ask for tokens, whoever makes them: a running cluster (gRPC) or a whole cluster in
// this process. Both take the same requests and apply the same checks.

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "moebius/v1/generation.grpc.pb.h"
#include "services/common/grpc_server.h"
#include "services/common/local_engine.h"

namespace moebius::services {

struct ClientFlags {
  std::string model;    // directory; local only
  std::string address;  // of a gateway; empty: in this process
  ListenOptions credentials;
  // How long a stream whose gateway went away tries to go on at that address; 0: not at all.
  std::chrono::seconds reconnect{30};
  LocalEngineOptions local;
};

class GenerationClient {
 public:
  static absl::StatusOr<std::unique_ptr<GenerationClient>> Open(const ClientFlags& flags);

  // Blocks until the stream ends; `on_event` runs on one thread at a time, maybe not the caller's.
  // `stop` is asked after each event: once it says true the request is cancelled (CANCELLED). When
  // the gateway dies the stream goes on with its next incarnation, behind the last token received.
  absl::Status Generate(const v1::GenerateRequest& request,
                        const std::function<void(const v1::GenerateEvent&)>& on_event,
                        const std::function<bool()>& stop = nullptr);
  absl::StatusOr<v1::ScoreReply> Score(const v1::ScoreRequest& request);
  // nullptr for a remote cluster.
  LocalEngine* local() { return local_.get(); }

 private:
  absl::Status GenerateLocally(const v1::GenerateRequest& request,
                               const std::function<void(const v1::GenerateEvent&)>& on_event,
                               const std::function<bool()>& stop);
  std::chrono::seconds reconnect_{0};
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Generation::Stub> stub_;
  std::unique_ptr<LocalEngine> local_;
};

}  // namespace moebius::services
