#pragma once

// Serves one client's request over as many attempts as it takes: a worker that dies or falls silent
// is replaced by another, which goes on behind the tokens told so far. One object a request, used
// by the request's thread.

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "moebius/v1/generation.grpc.pb.h"
#include "moebius/v1/worker.pb.h"
#include "services/common/model_host.h"
#include "services/common/stall_watch.h"
#include "services/gateway/client_events.h"
#include "services/gateway/request_journal.h"
#include "services/gateway/worker_table.h"

namespace moebius::services {

struct RelayCounters {
  std::atomic<uint64_t> tokens_out{0};
  std::atomic<uint64_t> slow_clients_cut{0};
  std::atomic<uint64_t> requests_replayed{0};  // attempts after the first that a worker took in
  std::atomic<uint64_t> tokens_replayed{0};    // told already, computed again for those
  std::atomic<uint64_t> workers_silent{0};     // attempts ended because no beat came
  std::atomic<uint64_t> requests_inexact{0};   // that another numerics class took over
  std::atomic<uint64_t> requests_poisonous{0};
};

// What a gateway's requests share.
struct RelayParts {
  const ModelHost& host;
  WorkerTable& workers;
  StallWatch& writes;   // clients that do not read
  StallWatch& silence;  // workers that have no beat
  RelayCounters& counters;
  std::atomic<uint64_t>& next_request;  // numbers of attempts, unique among gateways
  // How long a request waits for its first worker.
  std::chrono::milliseconds worker_wait;
};

class StreamRelay {
 public:
  StreamRelay(const RelayParts& parts, grpc::ServerContext& client, std::string request_id,
              int64_t deadline_ms);

  // `resume`: of the client's request; its tokens are in `request` already.
  grpc::Status Generate(v1::ResolvedRequest request, const v1::Resume& resume,
                        grpc::ServerWriter<v1::GenerateEvent>& writer);
  grpc::Status Score(v1::ResolvedScore request, v1::ScoreReply& reply);

 private:
  using Hold = WorkerTable::Hold;
  // Attempts until one ends the request. `attempt` says how one ended: OK when the request has.
  grpc::Status Run(RequestJournal& journal, const std::function<absl::Status(Hold&)>& attempt);
  // The call of one attempt and the watch over its beats.
  class Call;
  absl::Status GenerateOnce(Hold& hold, RequestJournal& journal, v1::ResolvedRequest& request,
                            ClientEvents& events, grpc::ServerWriter<v1::GenerateEvent>& writer);
  absl::Status ScoreOnce(Hold& hold, RequestJournal& journal, v1::ResolvedScore& request,
                         v1::ScoreReply& reply, int& most_positions);
  int64_t RemainingMs() const;
  absl::Status DeadlineStatus() const;

  const RelayParts parts_;
  grpc::ServerContext& client_;
  const std::string request_id_;
  const std::chrono::steady_clock::time_point begin_;
  const std::chrono::steady_clock::time_point deadline_;
  std::string numerics_class_;  // the stream began in; empty: not begun
  std::string told_class_;      // by the last event that named one
  bool inexact_ = false;
  bool answered_ = false;  // the present attempt's worker has
  bool client_gone_ = false;
};

}  // namespace moebius::services
