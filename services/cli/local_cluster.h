#pragma once

// A cluster of processes on this machine: started, watched, restarted with back-off within a
// budget, drained. The services run in sessions of their own: when the supervisor dies they go on,
// and a later one can adopt them from the state directory. A start that fails or is interrupted
// ends what it had started.
//
// State directory: cluster.json (addresses and process ids, kept from the first process on), one
// log and one port file per process, and a lock that its one supervisor holds.

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/unique_handle.h"
#include "services/cli/cluster_file.h"
#include "services/common/bind_policy.h"

namespace moebius::services {

struct LocalClusterOptions {
  std::string model;
  std::optional<int> attention;           // workers; unset: 1, or as many as an adopted cluster has
  std::optional<int> experts;             // likewise, 2
  std::optional<int> replicas;            // of each expert; likewise, 1
  std::string listen = "127.0.0.1:8700";  // of the gateway
  // TLS files for all processes; `insecure` for the gateway, which alone may listen beyond
  // loopback.
  ListenOptions credentials;
  std::string binaries;   // folder of the service binaries; empty: this program's own
  std::string state_dir;  // empty: below the user's state directory, by address
  bool adopt = false;     // take over a running cluster instead of refusing
  int threads = 1;
  int prefill_chunk = 128;
  int num_blocks = 256;
  int max_running = 64;
  // More flags of every process of a role ("gateway", "attention", ...).
  std::map<std::string, std::vector<std::string>> role_flags;
  int restarts_per_minute = 5;  // of one process; over it, it is left down
  // How often the caller was asked to stop. Once ends Start and WaitReady with CANCELLED, twice
  // also the patience of Drain. Empty: never.
  std::function<int()> stop_requests;
};

class LocalCluster {
 public:
  // Starts (or adopts) the processes. ALREADY_EXISTS when a cluster runs there and `adopt` is not
  // set, or when another supervisor is at work there; FAILED_PRECONDITION when the cluster to adopt
  // has other numbers of workers, or speaks TLS and we do not (or we do and it does not). `say`
  // gets one line for each thing that a person would want to know.
  static absl::StatusOr<LocalCluster> Start(const LocalClusterOptions& options,
                                            std::function<void(const std::string&)> say);

  // Waits until the gateway can make tokens, telling the progress; fails if a process dies
  // meanwhile (of an adopted cluster: restarts it).
  absl::Status WaitReady(std::chrono::seconds limit);

  // One look at every process: restarts what died. Call a few times a second.
  void Supervise();

  // SIGTERM to all (front door first), then waits; SIGKILL to what is left after `grace`.
  void Drain(std::chrono::seconds grace);

  const std::string& address() const { return gateway_address_; }
  int experts() const { return experts_; }
  bool adopted() const { return adopted_; }
  struct Process {
    std::string name;  // "expert-1"
    pid_t pid = 0;
    bool child = false;  // ours to reap; adopted ones are not
    std::vector<std::string> arguments;
    std::string port_file;
    std::string log_file;
    int64_t log_start = 0;  // where its last start begins in the log
    std::vector<std::chrono::steady_clock::time_point> restarts;
    std::chrono::steady_clock::time_point restart_at;
    bool waiting = false;  // dead, restart due at restart_at
    bool given_up = false;
  };
  const std::vector<Process>& processes() const { return processes_; }

 private:
  // What a process that ended said last.
  static std::string LastWord(const Process& process);
  // Makes and locks the state directory.
  absl::Status OpenStateDir();
  std::string PathOf(const std::string& file) const;
  void Describe(const std::string& controller_listen, const std::string& controller);
  bool Runs(const SavedCluster& saved) const;
  absl::Status Adopt(const SavedCluster& saved);
  // Ends what a supervisor had started that died before it knew where the gateway listens.
  void EndUnfinished(const SavedCluster& saved);
  absl::Status LaunchAll();
  int StopRequests() const { return options_.stop_requests ? options_.stop_requests() : 0; }
  // Its restarts take this address, not another free port.
  static void KeepListening(Process& process, const std::string& address);
  absl::Status Launch(Process& process);
  absl::StatusOr<std::string> AwaitAddress(Process& process, std::chrono::seconds limit);
  bool Alive(Process& process);
  absl::Status Save() const;

  LocalClusterOptions options_;
  std::function<void(const std::string&)> say_;
  UniqueFd lock_;
  int attention_ = 0;
  int experts_ = 0;
  int replicas_ = 1;
  bool adopted_ = false;
  std::string binaries_;
  std::string controller_address_;
  std::string gateway_address_;
  std::vector<Process> processes_;
};

}  // namespace moebius::services
