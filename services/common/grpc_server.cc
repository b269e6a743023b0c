#include "services/common/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "model/file_io.h"

namespace moebius::services {
namespace {

struct Pem {
  std::string cert, key, ca;
};

absl::StatusOr<Pem> ReadPem(const ListenOptions& options) {
  constexpr uint64_t kLimit = 1 << 20;
  Pem pem;
  ASSIGN_OR_RETURN(pem.cert, model::ReadSmallFile(options.tls_cert, kLimit));
  ASSIGN_OR_RETURN(pem.key, model::ReadSmallFile(options.tls_key, kLimit));
  ASSIGN_OR_RETURN(pem.ca, model::ReadSmallFile(options.tls_ca, kLimit));
  return pem;
}

}  // namespace

RunningServer::RunningServer() : health_(std::make_unique<Health>()) {}
RunningServer::RunningServer(RunningServer&&) noexcept = default;
RunningServer& RunningServer::operator=(RunningServer&&) noexcept = default;
RunningServer::~RunningServer() = default;

void RunningServer::SetServing(bool serving) {
  std::lock_guard<std::mutex> lock(health_->mutex);
  if (health_->stopped || health_->told == serving) return;
  health_->told = serving;
  server->GetHealthCheckService()->SetServingStatus(serving);
}

void RunningServer::StopServing() {
  std::lock_guard<std::mutex> lock(health_->mutex);
  health_->stopped = true;
  server->GetHealthCheckService()->SetServingStatus(false);
}

absl::StatusOr<RunningServer> StartServer(const ListenOptions& options,
                                          const std::vector<grpc::Service*>& services) {
  RETURN_IF_ERROR(CheckBindPolicy(options));
  static const bool plugins = [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    return true;
  }();
  (void)plugins;
  std::shared_ptr<grpc::ServerCredentials> credentials = grpc::InsecureServerCredentials();
  if (options.wants_tls()) {
    ASSIGN_OR_RETURN(const Pem pem, ReadPem(options));
    grpc::SslServerCredentialsOptions ssl(
        GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
    ssl.pem_root_certs = pem.ca;
    ssl.pem_key_cert_pairs.push_back({pem.key, pem.cert});
    credentials = grpc::SslServerCredentials(ssl);
  }
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(options.address, credentials, &port);
  builder.SetMaxReceiveMessageSize(16 << 20);
  // The bound of what waits for a slow reader is a stream's own queue, not gRPC's buffers.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, 4096);
  // Two servers on one port would split the clients between them without a word.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  for (grpc::Service* service : services) builder.RegisterService(service);
  RunningServer running;
  running.server = builder.BuildAndStart();
  if (running.server == nullptr || port == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options.address));
  }
  running.address = absl::StrCat(options.address.substr(0, options.address.rfind(':')), ":", port);
  running.SetServing(false);
  return running;
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const ListenOptions& options,
                                           bool own_connection) {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (options.wants_tls()) {
    const absl::StatusOr<Pem> pem = ReadPem(options);
    if (pem.ok()) {
      grpc::SslCredentialsOptions ssl;
      ssl.pem_root_certs = pem->ca;
      ssl.pem_private_key = pem->key;
      ssl.pem_cert_chain = pem->cert;
      credentials = grpc::SslCredentials(ssl);
    } else {
      LOG_ERROR(absl::StrCat("TLS credentials: ", pem.status().ToString()));
      credentials = nullptr;  // a channel whose every call fails
    }
  }
  grpc::ChannelArguments arguments;
  if (own_connection) arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  // Despite its name the time that one attempt may take: a busy or distant peer needs more than the
  // back-off after a refused one.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetMaxReceiveMessageSize(64 << 20);
  return grpc::CreateCustomChannel(address, credentials, arguments);
}

}  // namespace moebius::services
