#pragma once

// The attention workers as the controller's views and the calls to them show them, and which of
// them gets the next attempt of a request: the one with the fewest aboard among those that are
// ready.
//
// A worker that did not answer is put off for a moment, doubling up to a second, until a view shows
// its next incarnation: the controller learns of a death only when the lease lapses. Until it
// answers again it is tried by one request at a time.
//
// Suspects (services/gateway/request_journal.h) are given out one to a worker, and nobody else
// joins one where there is another worker.
//
// Thread-safe. Take blocks.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "moebius/v1/control.pb.h"
#include "moebius/v1/worker.grpc.pb.h"

namespace moebius::services {

class WorkerTable {
 public:
  using Stub = v1::AttentionService::StubInterface;
  using TimePoint = std::chrono::steady_clock::time_point;

  // A worker held for one attempt; gives its place back when it dies. One thread's.
  class Hold {
   public:
    ~Hold();
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

    Stub& stub() const { return *stub_; }
    uint64_t node() const { return node_; }
    // Model digest and arithmetic: equal classes give equal bits.
    const std::string& numerics_class() const { return numerics_class_; }
    // The worker has answered / has not, or is gone.
    void Answered();
    void Failed();
    // The request has made progress: it is no suspect any more. Any number of times.
    void Cleared();

   private:
    friend class WorkerTable;
    Hold(WorkerTable& table, uint64_t node, uint64_t incarnation, std::shared_ptr<Stub> stub,
         std::string numerics_class, bool suspect, bool probe)
        : table_(table),
          node_(node),
          incarnation_(incarnation),
          stub_(std::move(stub)),
          numerics_class_(std::move(numerics_class)),
          suspect_(suspect),
          probe_(probe) {}
    WorkerTable& table_;
    const uint64_t node_;
    const uint64_t incarnation_;
    const std::shared_ptr<Stub> stub_;
    const std::string numerics_class_;
    bool suspect_;
    bool probe_;  // whether a worker that failed is back
    bool answered_ = false;
  };

  // `dial` makes a worker's stub from its address.
  explicit WorkerTable(std::function<std::shared_ptr<Stub>(const std::string&)> dial)
      : dial_(std::move(dial)) {}

  void OnView(const v1::ClusterView& view);
  // Somebody is ready and every expert has a host: a token can be made now.
  bool CanServe() const;

  struct Wish {
    // Workers of this class; of another one from `any_class_from` on if none of this is left: none
    // is ready, or those that are have failed for long. Empty: any.
    std::string numerics_class;
    TimePoint any_class_from;
    TimePoint not_before;     // the request itself is put off until then
    uint64_t refused_by = 0;  // the node that would not have it: rather any other
    bool suspect = false;
  };
  // Waits for a worker: UNAVAILABLE at `until`; CANCELLED soon after `cancelled` says so.
  absl::StatusOr<std::unique_ptr<Hold>> Take(const Wish& wish, TimePoint until,
                                             const std::function<bool()>& cancelled);

 private:
  struct Worker {
    uint64_t incarnation = 0;
    std::string address;
    std::string numerics_class;
    std::shared_ptr<Stub> stub;
    bool ready = false;
    int held = 0;
    bool suspect = false;                   // it has one aboard
    std::chrono::milliseconds back_off{0};  // the last one; 0: it answered since
    TimePoint not_before;
  };
  using Workers = std::map<uint64_t, Worker>;  // by node
  // The best of those that may be asked now, or end(). Lowers `wake` to when a look is worth it.
  Workers::iterator Choose(const Wish& wish, TimePoint now, TimePoint& wake);

  const std::function<std::shared_ptr<Stub>(const std::string&)> dial_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Workers workers_;
  bool complete_ = false;
};

}  // namespace moebius::services
