#pragma once

// Real processes for tests: whole clusters, single services, and what asks them for tokens. Nothing
// here sleeps: everything waits on a file, a process or a stream, with a deadline.

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/cli/generation_client.h"
#include "services/cli/local_cluster.h"

namespace moebius::services {

// The trained checkpoint: it has a tokenizer.
extern const char* const kTestModel;
// Two layers of random weights, 256 ids, no tokenizer: thousands of tokens a second.
extern const char* const kRandomModel;

// A folder that no other test uses, removed at the end unless the test failed.
class ScopedFolder {
 public:
  ScopedFolder();
  ~ScopedFolder();
  ScopedFolder(const ScopedFolder&) = delete;
  ScopedFolder& operator=(const ScopedFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// A cluster of this test's own, ready when the constructor returns, drained by the destructor.
// Model (if none is named), address, binaries and state directory are set here.
class ScopedCluster {
 public:
  explicit ScopedCluster(LocalClusterOptions options);
  ~ScopedCluster();
  LocalCluster& operator*() { return *cluster_; }
  LocalCluster* operator->() { return cluster_.get(); }
  const LocalClusterOptions& options() const { return options_; }
  std::unique_ptr<GenerationClient> Client();
  pid_t Pid(const std::string& name) const;
  std::map<std::string, uint64_t> Counters();

 private:
  ScopedFolder folder_;
  LocalClusterOptions options_;
  std::unique_ptr<LocalCluster> cluster_;
};

// Counters of the process at `address`. `wanted` given: asks again until it holds, at most
// `limit`; the answer is then the last one.
std::map<std::string, uint64_t> Counters(const std::string& address);
std::map<std::string, uint64_t> AwaitCounters(
    const std::string& address,
    const std::function<bool(const std::map<std::string, uint64_t>&)>& wanted,
    std::chrono::seconds limit = std::chrono::seconds(60));

// Sum of the counters whose names end with `suffix`.
uint64_t SumOf(const std::map<std::string, uint64_t>& counters, const std::string& suffix);

// False for one that has ended, reaped or not.
bool IsRunning(pid_t pid);

// Processes (not ended ones) that name `text` in their command line: those of a state directory,
// say.
std::vector<pid_t> RunningWith(const std::string& text);

// One program, started in `folder`, killed by the destructor if it still runs. Output goes to
// "<name>.log" there. `binary` is one of ours, or a path.
class ServiceProcess {
 public:
  ServiceProcess(const ScopedFolder& folder, const std::string& name, const std::string& binary,
                 std::vector<std::string> arguments);
  ~ServiceProcess();
  ServiceProcess(const ServiceProcess&) = delete;
  ServiceProcess& operator=(const ServiceProcess&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal) const;
  // The address in its port file, or an error with the log if it ends first.
  absl::StatusOr<std::string> Address();
  // Until the log holds `text`.
  absl::Status AwaitLog(const std::string& text);
  // Waits for the end: the exit status, or 128 + the signal; nullopt when it still runs after
  // `limit`.
  std::optional<int> Wait(std::chrono::seconds limit = std::chrono::seconds(60));
  // Until `wanted`, which looks at files of the folder.
  absl::Status AwaitFile(const std::function<bool()>& wanted, const std::string& what);
  std::string Log() const;

 private:
  const std::string folder_;
  const std::string log_file_;
  const std::string port_file_;
  pid_t pid_ = 0;
  int pid_fd_ = -1;
};

struct Result {
  absl::Status status;
  std::vector<int32_t> ids;
  std::vector<uint64_t> digests;
  uint64_t preemptions = 0;
  std::chrono::steady_clock::duration longest_pause{};  // between two tokens
};

// `on_event` sees each event first.
Result Generate(GenerationClient& client, const v1::GenerateRequest& request,
                const std::function<void(const v1::GenerateEvent&)>& on_event = nullptr);

// Request i: a prompt of its own length and ids; every second one is sampled at temperature 1.
v1::GenerateRequest MakeRequest(int i, int64_t max_tokens = 24);

// A whole cluster in this process: what every other must equal.
std::unique_ptr<GenerationClient> OneProcess(const char* model = kTestModel);
// MakeRequest(0) .. MakeRequest(count - 1) in one process.
std::vector<Result> Yardstick(int count, int64_t max_tokens = 24);

void ExpectSame(const Result& got, const Result& expected, const std::string& what);

// MakeRequest(0) .. MakeRequest(count - 1) at the same time, each over a channel of its own.
std::vector<Result> Concurrently(const std::string& address, int count, int64_t max_tokens = 24);

}  // namespace moebius::services
