#pragma once

// Transport over UCX (1.13): active messages on tcp, in peer-error mode. UCX chooses eager or
// rendezvous by size; rows go from and to the pool's buffers.
//
// Settings are set in code, from measurements on this version, not by environment (see docs/adr):
// transports tcp and self, the one device that owns the bind address, sockaddr connections over
// tcp, rendezvous from 256 KiB, 64 KiB segments, listener address reuse. Shared memory is not used:
// it has no peer-failure handling here.
//
// UCX callbacks only append what happened; Poll turns it into events. A completed send means
// buffered, not delivered. Connect reports kConnected at once: UCX connects lazily, and a dead
// address shows as kClosed.
//
// Threading: the node's loop thread; Wake from any thread.

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "runtime/buffer_pool.h"
#include "runtime/transport.h"

namespace moebius::runtime::ucx {

struct UcxOptions {
  // IPv4 address to listen on; port 0 takes a free one. Also chooses the network device.
  std::string bind_address = "127.0.0.1:0";
  // Sends in flight per connection; then Send says kBusy.
  uint32_t max_sends_per_connection = 64;
  // Frames of one connection that may wait for a pool buffer; more close it. Peers that keep to
  // their credits stay far below.
  uint32_t max_waiting_frames = 1024;
  // Frames with a larger payload close their connection.
  uint64_t max_payload_bytes = 64 << 20;
};

// `pool` must outlive the transport. INVALID_ARGUMENT for a bad address, UNAVAILABLE if it cannot
// be bound.
absl::StatusOr<std::unique_ptr<Transport>> MakeUcxTransport(const UcxOptions& options,
                                                            BufferPool& pool);

}  // namespace moebius::runtime::ucx
