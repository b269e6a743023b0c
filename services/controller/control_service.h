#pragma once

// The Control service over ClusterState: one lock, one ticking thread, a condition for watchers.
// Watch streams hold a server thread each; there are as many as attention workers and gateways.

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "moebius/v1/control.grpc.pb.h"
#include "services/controller/cluster_state.h"

namespace moebius::services {

class ControlService final : public v1::Control::Service {
 public:
  // `term` identifies this controller's time in office; later ones are larger.
  ControlService(ClusterOptions options, uint64_t term);
  ~ControlService() override;

  grpc::Status Renew(grpc::ServerContext* context, const v1::RenewRequest* request,
                     v1::RenewReply* reply) override;
  grpc::Status Watch(grpc::ServerContext* context, const v1::WatchRequest* request,
                     grpc::ServerWriter<v1::ClusterView>* writer) override;

  // Ends the watch streams (before the server shuts down).
  void Stop();

 private:
  void FillView(v1::ClusterView* view) const;  // REQUIRES: mutex_ held

  std::mutex mutex_;
  std::condition_variable changed_;
  ClusterState state_;
  const uint64_t term_;
  bool stopping_ = false;
  std::thread ticker_;
};

}  // namespace moebius::services
