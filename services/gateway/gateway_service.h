#pragma once

// The front door: validates, turns text into ids and back, has each request served by an attention
// worker, and by another one if that dies. Holds the tokenizer, no weights.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "moebius/v1/generation.grpc.pb.h"
#include "services/common/controller_client.h"
#include "services/common/flags.h"
#include "services/common/stall_watch.h"
#include "services/common/status_service.h"
#include "services/gateway/request_check.h"
#include "services/gateway/stream_relay.h"
#include "services/gateway/worker_table.h"

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
  // Among the requests in flight; gives itself back when it dies.
  class Place;

  explicit Gateway(const ServiceFlags& flags);
  void OnView(const v1::ClusterView& view);
  // Its own counters and, by "<role>/<node>/", those of every worker that answers.
  StatusServiceImpl::Counters ReadCounters();
  absl::StatusOr<std::unique_ptr<Place>> Admit();
  // What the client calls the request.
  std::string IdOf(const std::string& chosen);
  RelayParts Parts() {
    return {*host_, workers_, writes_, silence_, relay_counters_, next_request_, worker_wait_};
  }

  std::unique_ptr<ModelHost> host_;
  RequestLimits limits_;
  const ListenOptions credentials_;
  const int max_in_flight_;
  const std::chrono::milliseconds worker_wait_;
  StallWatch writes_;
  StallWatch silence_;
  WorkerTable workers_;
  std::atomic<uint64_t> next_request_;
  std::atomic<uint64_t> requests_{0}, refused_{0};
  RelayCounters relay_counters_;
  std::mutex mutex_;
  std::condition_variable idle_;
  v1::ClusterView view_;
  bool draining_ = false;
  int in_flight_ = 0;
  std::unique_ptr<StatusServiceImpl> status_;
  RunningServer server_;
  std::unique_ptr<ControllerClient> controller_;
};

}  // namespace moebius::services
