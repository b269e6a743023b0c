#include "services/cli/local_cluster.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "moebius/v1/worker.grpc.pb.h"
#include "services/cli/cluster_file.h"
#include "services/common/grpc_server.h"

namespace moebius::services {
namespace {

using std::chrono::steady_clock;
constexpr std::chrono::milliseconds kPoll(30);

std::string DefaultStateDir(const std::string& listen) {
  const char* state = std::getenv("XDG_STATE_HOME");
  const char* home = std::getenv("HOME");
  const std::string base = state != nullptr && *state != 0
                               ? state
                               : absl::StrCat(home != nullptr ? home : "/tmp", "/.local/state");
  return absl::StrCat(base, "/moebius/", absl::StrReplaceAll(listen, {{":", "_"}, {"/", "_"}}));
}

std::string ReadProc(pid_t pid, const char* name) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/", name), std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// True if `pid` is a process that was started with this port file. A number from a file may have
// been given to somebody else's process since, or be one that has ended and that nobody reaps.
bool RunsWithPortFile(pid_t pid, const std::string& port_file) {
  if (pid <= 0) return false;
  const std::string stat = ReadProc(pid, "stat");
  const size_t name_end = stat.rfind(") ");
  if (name_end == std::string::npos || stat[name_end + 2] == 'Z') return false;
  const std::vector<std::string> arguments = absl::StrSplit(ReadProc(pid, "cmdline"), '\0');
  return std::find(arguments.begin(), arguments.end(), port_file) != arguments.end();
}

}  // namespace

absl::StatusOr<LocalCluster> LocalCluster::Start(const LocalClusterOptions& options,
                                                 std::function<void(const std::string&)> say) {
  LocalCluster cluster;
  cluster.options_ = options;
  cluster.say_ = std::move(say);
  if (cluster.options_.state_dir.empty())
    cluster.options_.state_dir = DefaultStateDir(options.listen);
  const std::string& dir = cluster.options_.state_dir;
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) return absl::UnavailableError(absl::StrCat(dir, ": ", error.message()));
  cluster.binaries_ = options.binaries;
  if (cluster.binaries_.empty()) {
    cluster.binaries_ =
        std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
  }

  const auto add = [&](const std::string& name, const std::string& binary,
                       std::vector<std::string> arguments) -> Process& {
    Process process;
    process.name = name;
    process.port_file = absl::StrCat(dir, "/", name, ".address");
    process.log_file = absl::StrCat(dir, "/", name, ".log");
    process.arguments = {cluster.binaries_ + "/moebius-" + binary, "--model", options.model,
                         "--port-file", process.port_file};
    process.arguments.insert(process.arguments.end(), arguments.begin(), arguments.end());
    if (const auto more = options.role_flags.find(binary); more != options.role_flags.end()) {
      process.arguments.insert(process.arguments.end(), more->second.begin(), more->second.end());
    }
    cluster.processes_.push_back(std::move(process));
    return cluster.processes_.back();
  };
  const auto add_all = [&](const std::string& controller_listen, const std::string& controller) {
    add("controller", "controller",
        {"--listen", controller_listen, "--expected-experts", absl::StrCat(options.experts)});
    add("gateway", "gateway", {"--listen", options.listen, "--controller", controller});
    for (int i = 0; i < options.attention; ++i) {
      add(absl::StrCat("attention-", i), "attention",
          {"--controller", controller, "--node", absl::StrCat("attention-", i), "--threads",
           absl::StrCat(options.threads), "--prefill-chunk", absl::StrCat(options.prefill_chunk),
           "--blocks", absl::StrCat(options.num_blocks), "--max-running",
           absl::StrCat(options.max_running)});
    }
    for (int i = 0; i < options.experts; ++i) {
      add(absl::StrCat("expert-", i), "expert",
          {"--controller", controller, "--node", absl::StrCat("expert-", i), "--threads",
           absl::StrCat(options.threads)});
    }
  };

  const absl::StatusOr<SavedCluster> saved = ReadClusterFile(dir + "/cluster.json");
  const bool running =
      saved.ok() &&
      std::any_of(saved->processes.begin(), saved->processes.end(), [&](const SavedProcess& p) {
        return RunsWithPortFile(p.pid, absl::StrCat(dir, "/", p.name, ".address"));
      });
  if (running && !options.adopt) {
    return absl::AlreadyExistsError(absl::StrCat("a cluster runs at ", saved->gateway, " (", dir,
                                                 "); --adopt supervises it, or stop it first"));
  }
  if (running) {
    cluster.controller_address_ = saved->controller;
    cluster.gateway_address_ = saved->gateway;
    add_all(saved->controller, saved->controller);
    for (Process& process : cluster.processes_) {
      for (const SavedProcess& old : saved->processes) {
        if (old.name == process.name) process.pid = old.pid;
      }
      if (process.name == "gateway") cluster.KeepListening(process, saved->gateway);
    }
    cluster.say_(absl::StrCat("adopted ", saved->processes.size(), " processes"));
    return cluster;
  }
  // The controller's address is known only once it listens; its restarts then keep it.
  add_all("127.0.0.1:0", "");
  for (Process& process : cluster.processes_) {
    std::filesystem::remove(process.port_file, error);
    if (process.name != "controller") {
      auto flag = std::find(process.arguments.begin(), process.arguments.end(), "--controller");
      *(flag + 1) = cluster.controller_address_;
    }
    RETURN_IF_ERROR(cluster.Launch(process));
    if (process.name == "controller") {
      ASSIGN_OR_RETURN(cluster.controller_address_,
                       cluster.AwaitAddress(process, std::chrono::seconds(30)));
      cluster.KeepListening(process, cluster.controller_address_);
    } else if (process.name == "gateway") {
      ASSIGN_OR_RETURN(cluster.gateway_address_,
                       cluster.AwaitAddress(process, std::chrono::seconds(30)));
      cluster.KeepListening(process, cluster.gateway_address_);
    }
  }
  RETURN_IF_ERROR(cluster.Save());
  return cluster;
}

void LocalCluster::KeepListening(Process& process, const std::string& address) {
  *(std::find(process.arguments.begin(), process.arguments.end(), "--listen") + 1) = address;
}

absl::Status LocalCluster::Launch(Process& process) {
  const int log = open(process.log_file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (log < 0) return absl::UnavailableError(absl::StrCat("cannot write ", process.log_file));
  std::vector<char*> argv;
  for (std::string& argument : process.arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const pid_t pid = fork();
  if (pid < 0) {
    close(log);
    return absl::ResourceExhaustedError("fork failed");
  }
  if (pid == 0) {
    setsid();  // a session of its own: our death is not its death
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    const int null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    dup2(log, 1);
    dup2(log, 2);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(log);
  process.pid = pid;
  process.child = true;
  process.waiting = false;
  return absl::OkStatus();
}

bool LocalCluster::Alive(Process& process) {
  if (process.pid <= 0) return false;
  if (process.child) {
    int status = 0;
    if (waitpid(process.pid, &status, WNOHANG) == process.pid) {
      process.pid = 0;
      return false;
    }
    return true;
  }
  return RunsWithPortFile(process.pid, process.port_file);
}

absl::StatusOr<std::string> LocalCluster::AwaitAddress(Process& process,
                                                       std::chrono::seconds limit) {
  const auto end = steady_clock::now() + limit;
  while (steady_clock::now() < end) {
    const absl::StatusOr<std::string> address = model::ReadSmallFile(process.port_file, 256);
    if (address.ok() && !address->empty()) return *address;
    if (!Alive(process)) {
      return absl::UnavailableError(
          absl::StrCat(process.name, " ended at its start; see ", process.log_file));
    }
    std::this_thread::sleep_for(kPoll);
  }
  return absl::DeadlineExceededError(
      absl::StrCat(process.name, " does not answer; see ", process.log_file));
}

absl::Status LocalCluster::Save() const {
  SavedCluster saved{gateway_address_, controller_address_, {}};
  for (const Process& process : processes_) saved.processes.push_back({process.name, process.pid});
  return model::ReplaceFile(options_.state_dir + "/cluster.json", WriteClusterFile(saved));
}

absl::Status LocalCluster::WaitReady(std::chrono::seconds limit) {
  auto stub = v1::StatusService::NewStub(MakeChannel(gateway_address_, ListenOptions()));
  const auto end = steady_clock::now() + limit;
  std::string last;
  while (steady_clock::now() < end) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
    v1::StatusReply reply;
    uint64_t ready = 0, experts = 0, attention = 0;
    if (stub->Status(&context, v1::StatusRequest(), &reply).ok()) {
      for (const v1::Counter& counter : reply.counters()) {
        if (counter.name() == "ready") ready = counter.value();
        if (counter.name() == "expert_workers_ready") experts = counter.value();
        if (counter.name() == "attention_workers_ready") attention = counter.value();
      }
    }
    const std::string line = absl::StrCat("loading: experts ", experts, "/", options_.experts,
                                          ", attention ", attention, "/", options_.attention);
    if (line != last) say_(line);
    last = line;
    if (ready != 0) return absl::OkStatus();
    for (Process& process : processes_) {
      if (!Alive(process))
        return absl::UnavailableError(absl::StrCat(process.name, " ended; see ", process.log_file));
    }
    std::this_thread::sleep_for(kPoll);
  }
  return absl::DeadlineExceededError(
      absl::StrCat("the cluster is not ready; see the logs in ", options_.state_dir));
}

void LocalCluster::Supervise() {
  const auto now = steady_clock::now();
  bool changed = false;
  for (Process& process : processes_) {
    if (process.given_up) continue;
    if (process.waiting) {
      if (now < process.restart_at) continue;
      std::error_code error;
      std::filesystem::remove(process.port_file, error);
      const absl::Status launched = Launch(process);
      say_(launched.ok() ? absl::StrCat("restarted ", process.name)
                         : std::string(launched.message()));
      changed = true;
      continue;
    }
    if (Alive(process)) continue;
    std::erase_if(process.restarts,
                  [&](const auto& at) { return now - at > std::chrono::minutes(1); });
    if (process.restarts.size() >= static_cast<size_t>(options_.restarts_per_minute)) {
      process.given_up = true;
      say_(absl::StrCat(process.name, " died ", process.restarts.size(),
                        " times within a minute: left down; see ", process.log_file));
      continue;
    }
    const auto delay = std::chrono::milliseconds(100) * (1 << process.restarts.size());
    process.restarts.push_back(now);
    process.restart_at = now + delay;
    process.waiting = true;
    say_(absl::StrCat(process.name, " died; restarting"));
  }
  if (changed) (void)Save();
}

void LocalCluster::Drain(std::chrono::seconds grace) {
  // The front door first, so that what it holds can still be finished by the others.
  const auto wave = [&](const std::string& prefix) {
    const auto end = steady_clock::now() + grace;
    for (Process& process : processes_) {
      if (process.name.rfind(prefix, 0) == 0 && Alive(process)) kill(process.pid, SIGTERM);
    }
    for (Process& process : processes_) {
      if (process.name.rfind(prefix, 0) != 0) continue;
      while (Alive(process) && steady_clock::now() < end) std::this_thread::sleep_for(kPoll);
      if (!Alive(process)) continue;
      say_(absl::StrCat(process.name, " does not stop: killed"));
      kill(process.pid, SIGKILL);
      while (Alive(process)) std::this_thread::sleep_for(kPoll);
    }
  };
  for (const char* prefix : {"gateway", "attention", "expert", "controller"}) wave(prefix);
  std::error_code error;
  std::filesystem::remove(options_.state_dir + "/cluster.json", error);
}

}  // namespace moebius::services
