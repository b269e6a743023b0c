#pragma once

// The live counters behind AttentionActor::counters(): written on the loop thread, read on any.

#include <atomic>
#include <cstdint>

#include "attention_worker/attention_options.h"

namespace moebius::attention_worker {

class LiveCounters {
 public:
  // Loop thread: changes the copy only it sees, then publishes.
  AttentionCounters local;
  void Publish() {
    steps_.store(local.steps, std::memory_order_relaxed);
    rows_.store(local.rows, std::memory_order_relaxed);
    tokens_out_.store(local.tokens_out, std::memory_order_relaxed);
    requests_.store(local.requests, std::memory_order_relaxed);
    refused_.store(local.refused, std::memory_order_relaxed);
    preemptions_.store(local.preemptions, std::memory_order_relaxed);
    route_requests_.store(local.route_requests, std::memory_order_relaxed);
    route_resends_.store(local.route_resends, std::memory_order_relaxed);
    route_rejected_.store(local.route_rejected, std::memory_order_relaxed);
    running_.store(local.running, std::memory_order_relaxed);
    waiting_.store(local.waiting, std::memory_order_relaxed);
    blocks_used_.store(local.blocks_used, std::memory_order_relaxed);
    blocks_total_.store(local.blocks_total, std::memory_order_relaxed);
  }

  // Any thread.
  AttentionCounters Snapshot() const {
    AttentionCounters out;
    out.steps = steps_.load(std::memory_order_relaxed);
    out.rows = rows_.load(std::memory_order_relaxed);
    out.tokens_out = tokens_out_.load(std::memory_order_relaxed);
    out.requests = requests_.load(std::memory_order_relaxed);
    out.refused = refused_.load(std::memory_order_relaxed);
    out.preemptions = preemptions_.load(std::memory_order_relaxed);
    out.route_requests = route_requests_.load(std::memory_order_relaxed);
    out.route_resends = route_resends_.load(std::memory_order_relaxed);
    out.route_rejected = route_rejected_.load(std::memory_order_relaxed);
    out.running = running_.load(std::memory_order_relaxed);
    out.waiting = waiting_.load(std::memory_order_relaxed);
    out.blocks_used = blocks_used_.load(std::memory_order_relaxed);
    out.blocks_total = blocks_total_.load(std::memory_order_relaxed);
    return out;
  }

 private:
  std::atomic<uint64_t> steps_{0}, rows_{0}, tokens_out_{0}, requests_{0}, refused_{0};
  std::atomic<uint64_t> preemptions_{0}, route_requests_{0}, route_resends_{0}, route_rejected_{0};
  std::atomic<uint64_t> running_{0}, waiting_{0}, blocks_used_{0}, blocks_total_{0};
};

}  // namespace moebius::attention_worker
