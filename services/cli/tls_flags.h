#pragma once

// The flags with which a subcommand speaks TLS; the same names in every command and service.

#include <CLI/CLI.hpp>

#include "services/common/bind_policy.h"

namespace moebius::services {

// `needs`, if given: an option without which these would have no effect.
inline void AddTlsFlags(CLI::App& command, ListenOptions& credentials,
                        CLI::Option* needs = nullptr) {
  for (CLI::Option* option :
       {command.add_option("--tls-cert", credentials.tls_cert, "PEM file; all three or none"),
        command.add_option("--tls-key", credentials.tls_key),
        command.add_option("--tls-ca", credentials.tls_ca,
                           "peers must present a certificate of this authority")}) {
    if (needs != nullptr) option->needs(needs);
  }
}

}  // namespace moebius::services
