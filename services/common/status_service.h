#pragma once

// StatusService of one process: counters by name, read when asked.

#include <functional>
#include <map>
#include <string>

#include "moebius/v1/worker.grpc.pb.h"

namespace moebius::services {

class StatusServiceImpl final : public v1::StatusService::Service {
 public:
  using Counters = std::map<std::string, uint64_t>;
  StatusServiceImpl(std::string role, uint64_t node, std::function<Counters()> read)
      : role_(std::move(role)), node_(node), read_(std::move(read)) {}
  grpc::Status Status(grpc::ServerContext*, const v1::StatusRequest*,
                      v1::StatusReply* reply) override {
    reply->set_role(role_);
    reply->set_node(node_);
    for (const auto& [name, value] : read_()) {
      v1::Counter* counter = reply->add_counters();
      counter->set_name(name);
      counter->set_value(value);
    }
    return grpc::Status::OK;
  }

 private:
  const std::string role_;
  const uint64_t node_;
  const std::function<Counters()> read_;
};

}  // namespace moebius::services
