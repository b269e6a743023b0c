#pragma once

// Where a process may listen: on loopback unless told otherwise, and then only with TLS or an
// explicit --insecure.

#include <string>

#include "absl/status/status.h"

namespace moebius::services {

// How a process listens for gRPC, and the credentials with which it calls its peers.
struct ListenOptions {
  std::string address = "127.0.0.1:0";  // port 0: a free one
  bool insecure = false;                // plain text on an address that is not loopback
  std::string tls_cert;                 // PEM files; all three together: mutual TLS
  std::string tls_key;
  std::string tls_ca;

  // Any of the three: a part of them is a mistake to be told, never a wish for plain text.
  bool wants_tls() const { return !tls_cert.empty() || !tls_key.empty() || !tls_ca.empty(); }
};

// INVALID_ARGUMENT when some of the TLS files are given and some are not.
absl::Status CheckTlsFiles(const ListenOptions& options);

// FAILED_PRECONDITION when the gRPC address is not loopback and there is neither TLS nor
// --insecure; INVALID_ARGUMENT when the TLS files are incomplete.
absl::Status CheckBindPolicy(const ListenOptions& options);

// For processes that register with the controller. The data plane has no encryption, so TLS for
// gRPC does not cover it: FAILED_PRECONDITION when `data_address` is not loopback and there is no
// --insecure. INVALID_ARGUMENT when either address is unspecified (0.0.0.0, [::]): both are given
// to peers as they stand.
absl::Status CheckWorkerBindPolicy(const ListenOptions& options, const std::string& data_address);

}  // namespace moebius::services
