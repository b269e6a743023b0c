#pragma once

// The front door: validates, turns text into ids and back, picks an attention worker for each
// request. Holds the tokenizer, no weights.

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "moebius/v1/generation.grpc.pb.h"
#include "moebius/v1/worker.grpc.pb.h"
#include "services/common/controller_client.h"
#include "services/common/flags.h"
#include "services/common/stall_watch.h"
#include "services/common/status_service.h"
#include "services/gateway/request_check.h"

namespace moebius::services {

class Gateway final : public v1::Generation::Service {
 public:
  static absl::StatusOr<std::unique_ptr<Gateway>> Start(const ServiceFlags& flags);
  ~Gateway() override;
  const std::string& address() const { return server_.address; }
  // Refuses new requests, waits for those in flight (bounded), stops.
  void Drain();

  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        grpc::ServerWriter<v1::GenerateEvent>* writer) override;
  grpc::Status Score(grpc::ServerContext* context, const v1::ScoreRequest* request,
                     v1::ScoreReply* reply) override;
  grpc::Status Tokenize(grpc::ServerContext* context, const v1::TokenizeRequest* request,
                        v1::TokenizeReply* reply) override;
  grpc::Status ListModels(grpc::ServerContext* context, const v1::ListModelsRequest* request,
                          v1::ListModelsReply* reply) override;

 private:
  struct Backend {
    std::string address;
    std::shared_ptr<v1::AttentionService::Stub> stub;
    bool ready = false;
    int in_flight = 0;
  };
  // A place among the requests in flight, and the worker that serves it; gives both back when it
  // dies.
  class Ticket;

  Gateway() = default;
  void OnView(const v1::ClusterView& view);
  // Its own counters and, by "<role>/<node>/", those of every worker that answers.
  StatusServiceImpl::Counters ReadCounters();
  absl::StatusOr<std::unique_ptr<Ticket>> Admit();

  std::unique_ptr<ModelHost> host_;
  RequestLimits limits_;
  ListenOptions credentials_;
  int max_in_flight_ = 0;
  std::unique_ptr<StallWatch> writes_;
  std::mutex mutex_;
  std::condition_variable idle_;
  std::map<uint64_t, Backend> backends_;  // by node
  bool complete_ = false;
  v1::ClusterView view_;
  bool draining_ = false;
  int in_flight_ = 0;
  std::atomic<uint64_t> next_request_{1};
  std::atomic<uint64_t> requests_{0}, tokens_{0}, refused_{0}, slow_clients_{0};
  std::unique_ptr<StatusServiceImpl> status_;
  RunningServer server_;
  std::unique_ptr<ControllerClient> controller_;
};

}  // namespace moebius::services
