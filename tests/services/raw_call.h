#pragma once

// gRPC calls of raw bytes: no generated stub between the test and the wire, so that a request may
// be anything, and services without generated code here (health, reflection) can be asked.

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>

namespace moebius::services {

// One message there and back. `method`: "/package.Service/Method". A server-streaming method that
// refuses ends the same way.
struct RawReply {
  grpc::Status status;
  std::string bytes;
};
RawReply RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                 const std::string& request,
                 grpc_compression_algorithm compression = GRPC_COMPRESS_NONE);

// A stream in both directions. One message is written at the start; what comes is read one by one.
class RawStream {
 public:
  RawStream(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
            const std::string& request);
  ~RawStream();
  // nullopt: the stream has ended, or nothing came within `limit` (it is then cancelled).
  std::optional<std::string> Read(std::chrono::seconds limit = std::chrono::seconds(60));
  // How the call ended; CANCELLED when it has not within a minute.
  grpc::Status Finish();

 private:
  bool Next(std::chrono::seconds limit);

  grpc::CompletionQueue queue_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
};

}  // namespace moebius::services
