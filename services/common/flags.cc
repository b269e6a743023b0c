#include "services/common/flags.h"

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <iostream>

#include "base/log.h"

namespace moebius::services {

ServiceFlags ParseFlagsOrExit(ServiceRole role, int argc, char** argv) {
  ServiceFlags flags;
  const char* names[] = {"controller", "gateway", "attention", "expert"};
  const char* name = names[static_cast<int>(role)];
  CLI::App app(std::string("Moebius ") + name);
  app.add_option("--model", flags.model, "model directory")
      ->required()
      ->check(CLI::ExistingDirectory);
  app.add_option("--listen", flags.listen.address, "gRPC address; port 0 takes a free one");
  app.add_flag("--insecure", flags.listen.insecure,
               "allow plain text on an address that is not loopback");
  app.add_option("--tls-cert", flags.listen.tls_cert);
  app.add_option("--tls-key", flags.listen.tls_key);
  app.add_option("--tls-ca", flags.listen.tls_ca,
                 "peers must present a certificate of this authority");
  app.add_option("--port-file", flags.port_file, "write the gRPC address here once serving");
  app.add_option("--log-level", flags.log_level)
      ->check(CLI::IsMember({"debug", "info", "warning", "error", "off"}));
  if (role != ServiceRole::kController) {
    app.add_option("--controller", flags.controller, "gRPC address of the controller")->required();
  }
  if (role == ServiceRole::kAttention || role == ServiceRole::kExpert) {
    app.add_option("--data-address", flags.data_address, "IPv4 address of the data plane");
    app.add_option(
        "--node", flags.node,
        "name of this worker, the same after a restart and no other's (default: random)");
    app.add_option("--threads", flags.threads, "compute threads")->check(CLI::Range(1, 256));
  }
  if (role == ServiceRole::kAttention) {
    app.add_option("--prefill-chunk", flags.prefill_chunk, "rows of one prompt in a step")
        ->check(CLI::Range(1, 512));
    app.add_option("--blocks", flags.num_blocks, "latent-cache blocks of 64 tokens")
        ->check(CLI::Range(1, 1 << 24));
    app.add_option("--max-running", flags.max_running, "sequences aboard at once")
        ->check(CLI::Range(1, 512));
    app.add_option("--stream-lag", flags.stream_lag,
                   "tokens that a stream's reader may lag behind before it is cut off")
        ->check(CLI::Range(1, 1 << 20));
  }
  if (role == ServiceRole::kController) {
    app.add_option("--expected-experts", flags.expected_experts,
                   "wait for so many before the first placement")
        ->check(CLI::Range(1, 4096));
    app.add_option("--replicas", flags.replicas,
                   "of each expert, on different workers (as many as there are, if fewer)")
        ->check(CLI::Range(1, 64));
  }
  if (role == ServiceRole::kGateway) {
    app.add_option("--max-in-flight", flags.max_in_flight)->check(CLI::Range(1, 100000));
    app.add_option("--default-deadline-ms", flags.default_deadline_ms)
        ->check(CLI::Range(1, 86'400'000));
    app.add_option("--write-stall-ms", flags.write_stall_ms,
                   "how long a client may leave a token unread before it is cut off")
        ->check(CLI::Range(1, 86'400'000));
    app.add_option("--worker-silence-ms", flags.worker_silence_ms,
                   "without a sign of life for so long, an attention worker's streams go on "
                   "elsewhere (it beats each 100 ms)")
        ->check(CLI::Range(200, 86'400'000));
    app.add_option("--worker-wait-ms", flags.worker_wait_ms,
                   "how long a new request waits for an attention worker that is ready")
        ->check(CLI::Range(0, 86'400'000));
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {  // CLI11 reports by exception; it ends here
    const int code = app.exit(error);
    std::exit(code == 0 ? 0 : 2);
  }
  const auto level = [&] {
    if (flags.log_level == "debug") return base::LogLevel::kDebug;
    if (flags.log_level == "warning") return base::LogLevel::kWarning;
    if (flags.log_level == "error") return base::LogLevel::kError;
    return flags.log_level == "off" ? base::LogLevel::kOff : base::LogLevel::kInfo;
  }();
  base::InitLog(name, level);
  return flags;
}

}  // namespace moebius::services
