#pragma once

// Command-line flags shared by the service binaries, parsed once, strictly: an unknown flag or a
// bad value ends the process with a message and exit code 2.

#include <cstdint>
#include <string>

#include "services/common/grpc_server.h"

namespace moebius::services {

struct ServiceFlags {
  std::string model;       // directory
  std::string controller;  // gRPC address; empty for the controller itself
  std::string data_address = "127.0.0.1:0";
  std::string node;  // workers: a name that restarts keep; empty: a random one
  ListenOptions listen;
  std::string port_file;  // where to write the gRPC address once serving
  std::string log_level = "info";
  int threads = 1;
  // Attention.
  int prefill_chunk = 128;
  int num_blocks = 256;
  int max_running = 64;
  int stream_lag = 8192;
  // Controller.
  uint32_t expected_experts = 1;
  uint32_t replicas = 1;
  // Gateway.
  int max_in_flight = 256;
  int64_t default_deadline_ms = 600'000;
  int64_t write_stall_ms = 30'000;
  int64_t worker_silence_ms = 2'000;
  int64_t worker_wait_ms = 10'000;
};

enum class ServiceRole { kController, kGateway, kAttention, kExpert };

// Parses argv for `role`, sets up logging; exits on a usage error or --help.
ServiceFlags ParseFlagsOrExit(ServiceRole role, int argc, char** argv);

}  // namespace moebius::services
