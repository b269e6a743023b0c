#pragma once

// absl::Status to grpc::Status and back; the codes are the same numbers.

#include <grpcpp/support/status.h>

#include <string>

#include "absl/status/status.h"

namespace moebius::services {

inline grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

inline absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace moebius::services
