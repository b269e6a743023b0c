#pragma once

// A node on the network: buffer pool, UCX transport, clock and loop thread in the order in which
// they must die.

#include <cstdint>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "runtime/node.h"
#include "services/common/model_host.h"
#include "services/common/steady_clock.h"

namespace moebius::services {

class DataNode {
 public:
  // Listens on `address`; the loop does not run yet: add actors, then Start. A process that is
  // started again under the same `name` is the next incarnation of the same node; an empty name is
  // a node of its own each time.
  static absl::StatusOr<std::unique_ptr<DataNode>> Open(const ModelHost& host,
                                                        const kernels::Backend& backend,
                                                        const std::string& address,
                                                        const std::string& name,
                                                        wire::NodeRole role);
  ~DataNode();
  runtime::Node& node() { return *node_; }
  const std::string& address() const { return address_; }
  void Start();
  void Stop();

 private:
  DataNode() = default;
  SteadyClock clock_;
  std::unique_ptr<runtime::BufferPool> pool_;
  std::unique_ptr<runtime::Transport> transport_;
  std::unique_ptr<runtime::Node> node_;
  std::string address_;
  std::thread loop_;
};

}  // namespace moebius::services
