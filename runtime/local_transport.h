#pragma once

// The transport of a node without peers: everything stays in the process (frames between actors of
// one node never reach a transport). It only sleeps and wakes.

#include <condition_variable>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/transport.h"

namespace moebius::runtime {

class LocalTransport final : public Transport {
 public:
  std::string ListenAddress() const override { return ""; }
  // There is nobody out there: the connection closes at once with UNAVAILABLE.
  ConnectionId Connect(const std::string& address) override;
  SendResult Send(ConnectionId, Frame&) override { return SendResult::kUnreachable; }
  void Close(ConnectionId) override {}
  void Poll(std::vector<TransportEvent>& events) override;
  void Wait(Duration timeout) override;
  void Wake() override;

 private:
  ConnectionId next_ = 1;
  std::vector<TransportEvent> events_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool woken_ = false;
};

}  // namespace moebius::runtime
