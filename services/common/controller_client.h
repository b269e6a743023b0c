#pragma once

// A worker's side of the Control service: renews the lease and carries the controller's orders, and
// watches the cluster. Both run on threads of their own and go on for ever: a controller that is
// away is retried, and what the worker last heard stays in force meanwhile (the data plane does not
// need the controller). A controller repeats its view each second; a watch that hears nothing for
// kWatchSilence is ended and everything connected anew, since a host that vanished without a word
// leaves connections that look alive.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "moebius/v1/control.grpc.pb.h"
#include "services/common/grpc_server.h"
#include "services/common/stall_watch.h"

namespace moebius::services {

inline constexpr std::chrono::milliseconds kWatchSilence(3000);

class ControllerClient {
 public:
  // `on_order` runs on a thread of its own for each new order (may take long: renewals go on); when
  // it returns OK the order counts as carried out. `on_view` runs on the watching thread; a view
  // for which it does not return OK is given to it again after a moment.
  struct Handlers {
    std::function<absl::Status(const v1::HostOrder&)> on_order;
    std::function<absl::Status(const v1::ClusterView&)> on_view;
  };
  // `self.node() == 0`: watch only (a gateway).
  ControllerClient(const std::string& address, const ListenOptions& credentials, v1::Worker self,
                   Handlers handlers, std::chrono::milliseconds silence = kWatchSilence);
  ~ControllerClient();

  // Starts the threads. Apart from the constructor, so that handlers may use what owns this client.
  void Start();
  void SetReady(bool ready);
  // Tells the controller to place nothing here any more (at once, best effort).
  void Leave();
  void Stop();

 private:
  void RenewLoop();
  void OrderLoop();
  void WatchLoop();
  bool Pause(std::chrono::milliseconds time);

  std::shared_ptr<v1::Control::Stub> Connect() const;

  const std::string address_;
  const ListenOptions credentials_;
  const Handlers handlers_;
  StallWatch silence_;
  std::mutex mutex_;
  std::shared_ptr<v1::Control::Stub> stub_;
  std::condition_variable wake_;
  v1::Worker self_;
  bool leaving_ = false;
  bool renew_now_ = false;
  uint64_t operation_done_ = 0;
  uint64_t term_ = 0;
  v1::HostOrder order_;  // the newest not yet started
  bool order_waiting_ = false;
  bool stopping_ = false;
  grpc::ClientContext* watching_ = nullptr;
  std::thread renew_thread_;
  std::thread order_thread_;
  std::thread watch_thread_;
};

}  // namespace moebius::services
