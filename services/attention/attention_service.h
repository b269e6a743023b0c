#pragma once

// One attention worker process: model, node with the attention actor and its router,
// AttentionService, controller client.

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "attention_worker/attention_actor.h"
#include "moebius/v1/worker.grpc.pb.h"
#include "router/router_actor.h"
#include "services/common/controller_client.h"
#include "services/common/data_node.h"
#include "services/common/flags.h"
#include "services/common/model_host.h"
#include "services/common/status_service.h"

namespace moebius::services {

// gRPC to actor messages and back. A thread per stream, bounded by the gateway's limit of requests
// in flight.
class AttentionRpc final : public v1::AttentionService::Service {
 public:
  // `stream_lag`: token events that a stream may lag behind before it is cut off (CANCELLED).
  AttentionRpc(runtime::Node* node, size_t stream_lag) : node_(node), stream_lag_(stream_lag) {}
  grpc::Status Generate(grpc::ServerContext* context, const v1::ResolvedRequest* request,
                        grpc::ServerWriter<v1::WorkerToken>* writer) override;
  grpc::Status Score(grpc::ServerContext* context, const v1::ResolvedScore* request,
                     grpc::ServerWriter<v1::WorkerScore>* writer) override;
  // Ends every stream with ABORTED, soon: this process ends.
  void EndStreams() { ending_ = true; }

 private:
  runtime::Node* const node_;
  const size_t stream_lag_;
  std::atomic<bool> ending_{false};
};

class AttentionProcess {
 public:
  static absl::StatusOr<std::unique_ptr<AttentionProcess>> Start(const ServiceFlags& flags);
  ~AttentionProcess();
  const std::string& address() const { return server_.address; }
  // Refuses new requests, finishes those aboard (bounded), stops.
  void Drain();

 private:
  AttentionProcess() = default;
  absl::Status OnView(const v1::ClusterView& view);
  StatusServiceImpl::Counters ReadCounters() const;

  std::unique_ptr<ModelHost> host_;
  std::unique_ptr<model::AttentionWorkerWeights> weights_;
  std::unique_ptr<kernels::Backend> attention_backend_;
  std::unique_ptr<kernels::Backend> router_backend_;
  std::unique_ptr<DataNode> data_;
  attention_worker::AttentionActor* actor_ = nullptr;  // owned by the node
  std::shared_ptr<const router::RouterCounters> router_counters_;
  std::unique_ptr<AttentionRpc> rpc_;
  std::unique_ptr<StatusServiceImpl> status_;
  RunningServer server_;
  bool complete_ = false;  // the watching thread's: every expert has a host
  std::unique_ptr<ControllerClient> controller_;
};

}  // namespace moebius::services
