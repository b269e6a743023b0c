#include "services/common/data_node.h"

#include "base/status_macros.h"
#include "runtime/ucx/ucx_transport.h"
#include "services/common/buffer_classes.h"

namespace moebius::services {

absl::StatusOr<std::unique_ptr<DataNode>> DataNode::Open(const ModelHost& host,
                                                         const kernels::Backend& backend,
                                                         const std::string& address,
                                                         const std::string& name,
                                                         wire::NodeRole role) {
  std::unique_ptr<DataNode> data(new DataNode());
  data->pool_ = std::make_unique<runtime::BufferPool>(
      MakeBufferClasses(host.config, kMaxStepRows, kMostPeers));
  runtime::ucx::UcxOptions options;
  options.bind_address = address;
  options.max_payload_bytes = data->pool_->max_buffer_bytes();
  ASSIGN_OR_RETURN(data->transport_, runtime::ucx::MakeUcxTransport(options, *data->pool_));
  runtime::NodeOptions node;
  node.identity = MakeIdentity(host, backend, name.empty() ? FreshNodeId() : NodeIdOf(name),
                               FreshIncarnation(), role);
  node.seed = node.identity.incarnation.value();
  // Several processes share few cores here: a stall of scheduling must not look like a death.
  node.timings.dead_after = std::chrono::seconds(5);
  data->node_ =
      std::make_unique<runtime::Node>(node, *data->transport_, data->clock_, *data->pool_);
  data->address_ = data->transport_->ListenAddress();
  return data;
}

DataNode::~DataNode() { Stop(); }

void DataNode::Start() {
  loop_ = std::thread([this] { node_->Run(); });
}

void DataNode::Stop() {
  if (!loop_.joinable()) return;
  node_->Stop();
  loop_.join();
}

}  // namespace moebius::services
