#include "runtime/local_transport.h"

#include <utility>

namespace moebius::runtime {

ConnectionId LocalTransport::Connect(const std::string&) {
  TransportEvent event;
  event.kind = TransportEvent::Kind::kClosed;
  event.connection = next_++;
  event.status = absl::UnavailableError("this node has no network");
  const ConnectionId id = event.connection;
  events_.push_back(std::move(event));
  return id;
}

void LocalTransport::Poll(std::vector<TransportEvent>& events) {
  for (TransportEvent& event : events_) events.push_back(std::move(event));
  events_.clear();
}

void LocalTransport::Wait(Duration timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait_for(lock, timeout, [this] { return woken_; });
  woken_ = false;
}

void LocalTransport::Wake() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
  }
  wake_.notify_one();
}

}  // namespace moebius::runtime
