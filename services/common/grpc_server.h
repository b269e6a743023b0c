#pragma once

// gRPC servers and channels of our processes, under one set of credentials. Health
// (grpc.health.v1) and reflection are always on.

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/common/bind_policy.h"

namespace grpc {
class Server;
class Service;
class Channel;
}  // namespace grpc

namespace moebius::services {

struct RunningServer {
  std::unique_ptr<grpc::Server> server;
  std::string address;  // with the port that was taken
  RunningServer();
  RunningServer(RunningServer&&) noexcept;
  RunningServer& operator=(RunningServer&&) noexcept;
  ~RunningServer();
  // grpc.health.v1 status of the whole server. Watchers hear of changes only. Any thread.
  void SetServing(bool serving);
  // NOT_SERVING for good: what SetServing says later has no effect.
  void StopServing();

 private:
  struct Health {
    std::mutex mutex;
    std::optional<bool> told;
    bool stopped = false;
  };
  std::unique_ptr<Health> health_;
};

// Serves `services` (borrowed until the server is shut down) where CheckBindPolicy allows it.
absl::StatusOr<RunningServer> StartServer(const ListenOptions& options,
                                          const std::vector<grpc::Service*>& services);

// A channel to a peer under the same credentials. If they are incomplete or cannot be read, every
// call over it fails; it never falls back to plain text. Channels to one address share a connection
// unless `own_connection`: for whoever must get away from one that died without a word.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const ListenOptions& options,
                                           bool own_connection = false);

}  // namespace moebius::services
