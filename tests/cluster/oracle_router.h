#pragma once

// A router without experts: answers each kRouteRequest with the oracle's routed sums, as compute
// work of its own. Lets a cluster test put everything but router/ and expert_worker/ to the test.

#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <variant>

#include "proto/wire/route.h"
#include "runtime/actor.h"
#include "tests/cluster/sequential_oracle.h"

namespace moebius::cluster_test {

class OracleRouter final : public runtime::Actor {
 public:
  // Borrows both.
  OracleRouter(const ToyModel* model, kernels::Backend* backend)
      : hidden_(model->config().hidden_size), oracle_(model, backend) {}

  void Receive(runtime::Message message, runtime::Context& context) override {
    if (auto* received = std::get_if<runtime::FrameReceived>(&message)) {
      const wire::FrameHeader& header = received->frame.header;
      if (header.type != static_cast<uint16_t>(wire::FrameType::kRouteRequest)) return;
      if (!wire::ValidateRoute(header, received->frame.payload.size(), hidden_, 4096).ok()) return;
      jobs_.push_back({std::move(*received), false});
      // One job at a time may be in work, so that the front stays put.
      if (jobs_.size() == 1) Submit(context);
    } else if (std::get_if<runtime::ComputeDone>(&message) != nullptr) {
      jobs_.front().done = true;
      Reply(context);
    } else if (std::get_if<runtime::Writable>(&message) != nullptr) {
      Reply(context);
    }
  }

 private:
  struct Job {
    runtime::FrameReceived request;
    bool done;
  };

  void Submit(runtime::Context& context) {
    context.Submit(
        [this] {
          runtime::Frame& frame = jobs_.front().request.frame;
          // In place: a row's sum needs that row alone.
          auto* rows = reinterpret_cast<Bf16*>(frame.payload.data());
          std::vector<Bf16> sum(hidden_);
          for (uint32_t i = 0; i < frame.header.row_count; ++i) {
            oracle_.RoutedSum(frame.header.layer, rows + i * hidden_, sum.data());
            std::copy(sum.begin(), sum.end(), rows + i * hidden_);
          }
          return absl::OkStatus();
        },
        0);
  }

  void Reply(runtime::Context& context) {
    if (jobs_.empty() || !jobs_.front().done) return;
    runtime::FrameReceived& job = jobs_.front().request;
    job.frame.header.type = static_cast<uint16_t>(wire::FrameType::kRouteReply);
    if (context.Send(job.from, job.frame) == runtime::SendResult::kBusy) return;
    jobs_.pop_front();
    if (!jobs_.empty()) Submit(context);
  }

  const int64_t hidden_;
  SequentialOracle oracle_;
  std::deque<Job> jobs_;
};

}  // namespace moebius::cluster_test
