#pragma once

// Stands in for the router in tests of the attention actor alone: answers kRouteRequest with the
// oracle's routed sums after a random delay, and misbehaves on request. One per FakeNode.

#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "proto/wire/route.h"
#include "tests/attention_worker/fake_node.h"
#include "tests/cluster/sequential_oracle.h"

namespace moebius::attention_worker {

struct RouterFaults {
  uint32_t drop_percent = 0;       // requests that are never answered
  uint32_t busy_percent = 0;       // refused with kBusy, Writable later
  uint32_t duplicate_percent = 0;  // answered twice
  uint32_t garbage_percent = 0;    // preceded by an answer that must not be accepted
};

class FakeRouter {
 public:
  FakeRouter(FakeNode* node, cluster_test::SequentialOracle* oracle, int64_t hidden,
             runtime::Duration max_delay, const RouterFaults& faults)
      : node_(*node), oracle_(*oracle), hidden_(hidden), max_delay_(max_delay), faults_(faults) {
    node->OnSend(
        [this](const runtime::ActorAddress& to, runtime::Frame& frame) { return Send(to, frame); });
  }

  bool unreachable = false;
  uint64_t requests = 0;
  uint64_t resent = 0;     // requests with attempt > 0
  uint64_t abandoned = 0;  // rows
  std::set<uint64_t> correlations;

 private:
  bool Percent(uint32_t percent) { return node_.prng().Below(100) < percent; }

  runtime::SendResult Send(const runtime::ActorAddress& to, runtime::Frame& frame) {
    if (unreachable) return runtime::SendResult::kUnreachable;
    const wire::FrameHeader header = frame.header;
    if (header.type == static_cast<uint16_t>(wire::FrameType::kRouteAbandon)) {
      CHECK(wire::ValidateRouteAbandon(header, frame.payload.bytes(), 4096).ok());
      abandoned += header.item_count;
      frame.payload = runtime::Buffer();
      return runtime::SendResult::kSent;
    }
    if (Percent(faults_.busy_percent)) {
      node_.Deliver(runtime::Writable{to.node}, Delay());
      return runtime::SendResult::kBusy;
    }
    CHECK_EQ(header.type, static_cast<uint16_t>(wire::FrameType::kRouteRequest));
    CHECK(wire::ValidateRoute(header, frame.payload.size(), hidden_, 4096).ok());
    ++requests;
    if (header.attempt > 0) ++resent;
    correlations.insert(header.correlation);
    runtime::Buffer request = std::move(frame.payload);
    frame.payload = runtime::Buffer();
    if (Percent(faults_.drop_percent)) return runtime::SendResult::kSent;
    if (Percent(faults_.garbage_percent)) {
      wire::FrameHeader wrong = header;
      switch (node_.prng().Below(4)) {
        case 0:
          wrong.correlation += 1;
          break;
        case 1:
          wrong.layer += 1;
          break;
        case 2:
          wrong.row_bytes += 2;
          break;
        default:
          wrong.row_count += 1;
          break;
      }
      Answer(to, wrong, request, /*garbage=*/true);
    }
    Answer(to, header, request, false);
    if (Percent(faults_.duplicate_percent)) Answer(to, header, request, false);
    return runtime::SendResult::kSent;
  }

  void Answer(const runtime::ActorAddress& from, wire::FrameHeader header,
              const runtime::Buffer& request, bool garbage) {
    runtime::FrameReceived reply;
    reply.from = from;
    header.type = static_cast<uint16_t>(wire::FrameType::kRouteReply);
    std::optional<runtime::Buffer> buffer = node_.pool().Acquire(request.size());
    CHECK(buffer.has_value());
    if (garbage) {
      std::memset(buffer->data(), 0x42, buffer->size());
    } else {
      for (uint32_t row = 0; row < header.row_count; ++row) {
        oracle_.RoutedSum(header.layer,
                          reinterpret_cast<const Bf16*>(request.data()) + row * hidden_,
                          reinterpret_cast<Bf16*>(buffer->data()) + row * hidden_);
      }
    }
    reply.frame.header = header;
    reply.frame.payload = *std::move(buffer);
    node_.Deliver(std::move(reply), Delay());
  }

  runtime::Duration Delay() {
    return runtime::Duration(static_cast<int64_t>(node_.prng().Below(max_delay_.count() + 1)));
  }

  FakeNode& node_;
  cluster_test::SequentialOracle& oracle_;
  const int64_t hidden_;
  const runtime::Duration max_delay_;
  const RouterFaults faults_;
};

}  // namespace moebius::attention_worker
