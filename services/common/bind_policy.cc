#include "services/common/bind_policy.h"

#include <arpa/inet.h>

#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace moebius::services {
namespace {

// In host byte order, if the host part is a literal IPv4 address.
std::optional<uint32_t> Ipv4Of(const std::string& address) {
  in_addr parsed;
  if (inet_pton(AF_INET, address.substr(0, address.rfind(':')).c_str(), &parsed) != 1) {
    return std::nullopt;
  }
  return ntohl(parsed.s_addr);
}

// A literal address, or the name that every machine keeps for it: "127.example.org" is anywhere.
bool IsLoopback(const std::string& address) {
  if (absl::StartsWith(address, "unix:") || absl::StartsWith(address, "localhost:") ||
      absl::StartsWith(address, "[::1]:")) {
    return true;
  }
  const std::optional<uint32_t> ipv4 = Ipv4Of(address);
  return ipv4 && *ipv4 >> 24 == 127;
}

bool IsUnspecified(const std::string& address) {
  return absl::StartsWith(address, "[::]:") || Ipv4Of(address) == 0u;
}

}  // namespace

absl::Status CheckTlsFiles(const ListenOptions& options) {
  const bool all = !options.tls_cert.empty() && !options.tls_key.empty() && !options.tls_ca.empty();
  if (!options.wants_tls() || all) return absl::OkStatus();
  return absl::InvalidArgumentError("--tls-cert, --tls-key and --tls-ca go together");
}

absl::Status CheckBindPolicy(const ListenOptions& options) {
  RETURN_IF_ERROR(CheckTlsFiles(options));
  if (!IsLoopback(options.address) && !options.wants_tls() && !options.insecure) {
    return absl::FailedPreconditionError(
        absl::StrCat("address ", options.address,
                     " is not loopback: give --tls-cert, --tls-key and --tls-ca, or --insecure"));
  }
  return absl::OkStatus();
}

absl::Status CheckWorkerBindPolicy(const ListenOptions& options, const std::string& data_address) {
  RETURN_IF_ERROR(CheckBindPolicy(options));
  for (const auto& [flag, address] :
       {std::pair<const char*, const std::string&>("--listen", options.address),
        {"--data-address", data_address}}) {
    if (IsUnspecified(address)) {
      return absl::InvalidArgumentError(absl::StrCat(
          flag, " ", address, ": peers are told this address, so name one of this host"));
    }
  }
  if (!IsLoopback(data_address) && !options.insecure) {
    return absl::FailedPreconditionError(absl::StrCat(
        "--data-address ", data_address,
        " is not loopback, and the data plane is plain text whatever gRPC uses: give --insecure if "
        "its network is yours alone"));
  }
  return absl::OkStatus();
}

}  // namespace moebius::services
