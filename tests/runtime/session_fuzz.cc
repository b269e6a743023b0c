// Feeds sequences of frames, well-formed, damaged and out of place, to a node: it must survive
// them, deliver nothing before a handshake, give back every buffer, and still serve an honest peer.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>

#include "base/check.h"
#include "tests/runtime/raw_peer.h"

namespace {

using namespace moebius;
using namespace moebius::runtime;
using namespace moebius::runtime::session_test;
using std::chrono::milliseconds;
using wire::FrameType;

constexpr NodeId kHonest{3};

// Counts what it gets.
class Counter final : public Actor {
 public:
  explicit Counter(uint64_t& frames) : frames_(frames) {}
  void Receive(Message message, Context&) override {
    frames_ += std::get_if<FrameReceived>(&message) != nullptr ? 1 : 0;
  }

 private:
  uint64_t& frames_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto next = [&]() -> uint8_t { return size > 0 ? (--size, *data++) : 0; };
  size = std::min<size_t>(size, 200);
  sim::SimWorld world(1);
  uint64_t frames = 0;
  NodeOptions options = Agreed();
  options.local_messages = 16;
  options.credits_per_session = 2;
  world.AddNode(kNode, options, {{256, 8}, {1024, 2}}, [&frames](Node& node) {
    node.AddActor(kActor, std::make_unique<Counter>(frames));
  });
  world.AddBareTransport(kPeer, {{256, 128}, {4096, 16}});
  world.AddBareTransport(kHonest, {{256, 128}});
  RawPeer peer(world, kPeer);
  bool said_hello = false;
  while (size > 0) {
    switch (next() % 8) {
      case 0:
        peer.Dial();
        break;
      case 1: {
        wire::HelloRecord hello = peer.GoodHello();
        const uint8_t at = next();
        if (at < sizeof(hello)) reinterpret_cast<uint8_t*>(&hello)[at] ^= next();
        peer.SayHello(hello, next() % 4 == 0 ? FrameType::kHelloReply : FrameType::kHello);
        said_hello = true;
        break;
      }
      case 2:
        peer.Wait(milliseconds(next()));
        break;
      case 3:
        peer.Wait(milliseconds(10 * next()));
        break;
      case 4:
        peer.Close();
        break;
      default: {
        const uint8_t type = next();
        wire::FrameHeader header =
            peer.Header(static_cast<FrameType>(type < 128 ? type % 8 : 240), next());
        const uint8_t at = next();
        const bool before_sealing = next() % 4 != 0;
        std::byte payload[600] = {};
        const size_t length = next() % 4 != 0 ? 0 : next() * 2;
        if (!before_sealing) wire::SealFrame(header, {payload, length});
        // Half of the frames stay as they should be.
        if (at < sizeof(header)) reinterpret_cast<uint8_t*>(&header)[at] ^= next();
        if (at < 8) header.magic = wire::kFrameMagic;  // else nothing gets past the first check
        peer.Send(header, {payload, length}, before_sealing);
      }
    }
  }
  peer.Close();
  peer.Wait(milliseconds(100));
  CHECK(said_hello || frames == 0);
  CHECK_EQ(world.pool(kNode).in_use(), 0u);
  const uint64_t before = frames;
  RawPeer honest(world, kHonest);
  honest.Join();
  CHECK_EQ(honest.Received(FrameType::kHelloReply), 1u);
  honest.Send(honest.Header(FrameType::kTest, 1));
  honest.Wait();
  CHECK_EQ(frames, before + 1);
  return 0;
}
