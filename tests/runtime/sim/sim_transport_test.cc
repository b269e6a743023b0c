// The simulated network keeps the transport contract.

#include "runtime/sim/sim_world.h"
#include "tests/runtime/transport_conformance.h"

namespace moebius::runtime {
namespace {

class SimHarness {
 public:
  SimHarness() : world_(17) {
    server_ = &world_.AddBareTransport(NodeId(1), Buffers());
    client_ = &world_.AddBareTransport(NodeId(2), Buffers());
  }
  Transport& server() { return *server_; }
  Transport& client() { return *client_; }
  BufferPool& server_pool() { return world_.pool(NodeId(1)); }
  BufferPool& client_pool() { return world_.pool(NodeId(2)); }
  void Advance() { world_.RunFor(std::chrono::microseconds(100)); }
  void KillServer() { world_.Crash(NodeId(1)); }
  void RestartServer() {
    world_.Restart(NodeId(1));
    server_ = world_.transport(NodeId(1));
  }

 private:
  static std::vector<BufferClass> Buffers() { return {{4096, 256}, {65536, 320}, {4 << 20, 16}}; }
  sim::SimWorld world_;
  sim::SimTransport* server_;
  sim::SimTransport* client_;
};

INSTANTIATE_TYPED_TEST_SUITE_P(Simulated, TransportConformance, SimHarness);

}  // namespace
}  // namespace moebius::runtime
