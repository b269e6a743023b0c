#include "services/cli/local_cluster.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "model/file_io.h"
#include "moebius/v1/worker.grpc.pb.h"
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

bool HasArgument(pid_t pid, const std::string& argument) {
  const std::vector<std::string> arguments = absl::StrSplit(ReadProc(pid, "cmdline"), '\0');
  return std::find(arguments.begin(), arguments.end(), argument) != arguments.end();
}

// True if `pid` is a process that was started with this port file. A number from a file may have
// been given to somebody else's process since, or be one that has ended and that nobody reaps.
bool RunsWithPortFile(pid_t pid, const std::string& port_file) {
  if (pid <= 0) return false;
  const std::string stat = ReadProc(pid, "stat");
  const size_t name_end = stat.rfind(") ");
  if (name_end == std::string::npos || stat[name_end + 2] == 'Z') return false;
  return HasArgument(pid, port_file);
}

// Where to call what listens on `address`: "any address" is none that a certificate could name.
std::string DialAddress(const std::string& address) {
  if (absl::StartsWith(address, "0.0.0.0:")) return absl::StrCat("127.0.0.1", address.substr(7));
  if (absl::StartsWith(address, "[::]:")) return absl::StrCat("[::1]", address.substr(4));
  return address;
}

}  // namespace

absl::StatusOr<LocalCluster> LocalCluster::Start(const LocalClusterOptions& options,
                                                 std::function<void(const std::string&)> say) {
  LocalCluster cluster;
  cluster.options_ = options;
  cluster.say_ = std::move(say);
  ListenOptions gateway = options.credentials;
  gateway.address = options.listen;
  RETURN_IF_ERROR(CheckBindPolicy(gateway));
  RETURN_IF_ERROR(cluster.OpenStateDir());
  const absl::StatusOr<SavedCluster> saved = ReadClusterFile(cluster.PathOf("cluster.json"));
  if (saved.ok() && cluster.Runs(*saved)) {
    if (!options.adopt) {
      return absl::AlreadyExistsError(absl::StrCat(
          saved->gateway.empty() ? "what an unfinished start has left runs"
                                 : absl::StrCat("a cluster runs at ", saved->gateway),
          " (", cluster.options_.state_dir, "); --adopt takes it over, or stop it first"));
    }
    if (!saved->gateway.empty()) {
      RETURN_IF_ERROR(cluster.Adopt(*saved));
      return cluster;
    }
    cluster.EndUnfinished(*saved);
  }
  if (const absl::Status launched = cluster.LaunchAll(); !launched.ok()) {
    cluster.Drain(std::chrono::seconds(5));
    return launched;
  }
  return cluster;
}

std::string LocalCluster::PathOf(const std::string& file) const {
  return absl::StrCat(options_.state_dir, "/", file);
}

absl::Status LocalCluster::OpenStateDir() {
  if (options_.state_dir.empty()) options_.state_dir = DefaultStateDir(options_.listen);
  std::error_code error;
  std::filesystem::create_directories(options_.state_dir, error);
  if (error) {
    return absl::UnavailableError(absl::StrCat(options_.state_dir, ": ", error.message()));
  }
  binaries_ = options_.binaries;
  if (binaries_.empty()) {
    binaries_ = std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
  }
  // The lock is the open file's: it ends with this process, however that ends.
  const std::string path = PathOf("lock");
  lock_.reset(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!lock_) return model::ErrnoStatus(errno, path, "cannot open");
  if (flock(lock_.get(), LOCK_EX | LOCK_NB) == 0) return absl::OkStatus();
  if (errno != EWOULDBLOCK) return model::ErrnoStatus(errno, path, "cannot lock");
  return absl::AlreadyExistsError(
      absl::StrCat(options_.state_dir, ": another supervisor is at work there"));
}

void LocalCluster::Describe(const std::string& controller_listen, const std::string& controller) {
  const auto add = [&](const std::string& name, const std::string& binary,
                       std::vector<std::string> arguments) {
    Process process;
    process.name = name;
    process.port_file = PathOf(name + ".address");
    process.log_file = PathOf(name + ".log");
    process.arguments = {binaries_ + "/moebius-" + binary, "--model", options_.model, "--port-file",
                         process.port_file};
    process.arguments.insert(process.arguments.end(), arguments.begin(), arguments.end());
    if (const ListenOptions& tls = options_.credentials; tls.wants_tls()) {
      process.arguments.insert(process.arguments.end(), {"--tls-cert", tls.tls_cert, "--tls-key",
                                                         tls.tls_key, "--tls-ca", tls.tls_ca});
    }
    if (const auto more = options_.role_flags.find(binary); more != options_.role_flags.end()) {
      process.arguments.insert(process.arguments.end(), more->second.begin(), more->second.end());
    }
    processes_.push_back(std::move(process));
  };
  add("controller", "controller",
      {"--listen", controller_listen, "--expected-experts", absl::StrCat(experts_), "--replicas",
       absl::StrCat(replicas_)});
  std::vector<std::string> gateway{"--listen", options_.listen, "--controller", controller};
  if (options_.credentials.insecure) gateway.push_back("--insecure");
  add("gateway", "gateway", std::move(gateway));
  for (int i = 0; i < attention_; ++i) {
    add(absl::StrCat("attention-", i), "attention",
        {"--controller", controller, "--node", absl::StrCat("attention-", i), "--threads",
         absl::StrCat(options_.threads), "--prefill-chunk", absl::StrCat(options_.prefill_chunk),
         "--blocks", absl::StrCat(options_.num_blocks), "--max-running",
         absl::StrCat(options_.max_running)});
  }
  for (int i = 0; i < experts_; ++i) {
    add(absl::StrCat("expert-", i), "expert",
        {"--controller", controller, "--node", absl::StrCat("expert-", i), "--threads",
         absl::StrCat(options_.threads)});
  }
}

bool LocalCluster::Runs(const SavedCluster& saved) const {
  return std::any_of(saved.processes.begin(), saved.processes.end(), [&](const SavedProcess& p) {
    return RunsWithPortFile(p.pid, PathOf(p.name + ".address"));
  });
}

absl::Status LocalCluster::Adopt(const SavedCluster& saved) {
  for (const SavedProcess& process : saved.processes) {
    attention_ += absl::StartsWith(process.name, "attention-") ? 1 : 0;
    experts_ += absl::StartsWith(process.name, "expert-") ? 1 : 0;
  }
  replicas_ = saved.replicas;
  // Workers more or less would be nobody's: neither supervised nor ended.
  if (options_.attention.value_or(attention_) != attention_ ||
      options_.experts.value_or(experts_) != experts_ ||
      options_.replicas.value_or(replicas_) != replicas_) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the cluster at ", saved.gateway, " has --attention ", attention_, " --experts ", experts_,
        " --replicas ", replicas_, ": adopt it with these or without the flags, or stop it first"));
  }
  // Without its credentials we could neither ask it nor restart a part of it.
  const bool speaks_tls =
      std::any_of(saved.processes.begin(), saved.processes.end(), [&](const SavedProcess& p) {
        return RunsWithPortFile(p.pid, PathOf(p.name + ".address")) &&
               HasArgument(p.pid, "--tls-cert");
      });
  if (speaks_tls != options_.credentials.wants_tls()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the cluster at ", saved.gateway,
                     speaks_tls ? " speaks TLS: give --tls-cert, --tls-key and --tls-ca"
                                : " speaks plain text: leave out the TLS flags"));
  }
  adopted_ = true;
  controller_address_ = saved.controller;
  gateway_address_ = saved.gateway;
  Describe(saved.controller, saved.controller);
  for (const SavedProcess& old : saved.processes) {
    const auto process = std::find_if(processes_.begin(), processes_.end(),
                                      [&](const Process& p) { return p.name == old.name; });
    if (process == processes_.end()) {
      return absl::FailedPreconditionError(
          absl::StrCat(PathOf("cluster.json"), ": ", old.name, " is not a process of a cluster"));
    }
    process->pid = old.pid;
    if (process->name == "gateway") KeepListening(*process, saved.gateway);
  }
  say_(absl::StrCat("adopted ", saved.processes.size(), " processes"));
  return absl::OkStatus();
}

void LocalCluster::EndUnfinished(const SavedCluster& saved) {
  say_("ending what an unfinished start has left");
  for (const SavedProcess& old : saved.processes) {
    Process process;
    process.name = old.name;
    process.pid = old.pid;
    process.port_file = PathOf(old.name + ".address");
    processes_.push_back(std::move(process));
  }
  Drain(std::chrono::seconds(5));
  processes_.clear();
}

absl::Status LocalCluster::LaunchAll() {
  attention_ = options_.attention.value_or(1);
  experts_ = options_.experts.value_or(2);
  replicas_ = options_.replicas.value_or(1);
  // The controller's address is known only once it listens; its restarts then keep it.
  Describe("127.0.0.1:0", "");
  for (Process& process : processes_) {
    if (StopRequests() > 0) return absl::CancelledError("interrupted");
    std::error_code error;
    std::filesystem::remove(process.port_file, error);
    if (process.name != "controller") {
      auto flag = std::find(process.arguments.begin(), process.arguments.end(), "--controller");
      *(flag + 1) = controller_address_;
    }
    RETURN_IF_ERROR(Launch(process));
    RETURN_IF_ERROR(Save());
    say_(absl::StrCat("starting ", process.name));
    if (process.name == "controller") {
      ASSIGN_OR_RETURN(controller_address_, AwaitAddress(process, std::chrono::seconds(30)));
      KeepListening(process, controller_address_);
    } else if (process.name == "gateway") {
      ASSIGN_OR_RETURN(gateway_address_, AwaitAddress(process, std::chrono::seconds(30)));
      KeepListening(process, gateway_address_);
    }
  }
  return Save();
}

void LocalCluster::KeepListening(Process& process, const std::string& address) {
  *(std::find(process.arguments.begin(), process.arguments.end(), "--listen") + 1) = address;
}

absl::Status LocalCluster::Launch(Process& process) {
  const int log = open(process.log_file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (log < 0) return absl::UnavailableError(absl::StrCat("cannot write ", process.log_file));
  process.log_start = lseek(log, 0, SEEK_END);
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
    const char message[] = "cannot be run\n";
    (void)!write(2, message, sizeof(message) - 1);
    _exit(127);
  }
  close(log);
  process.pid = pid;
  process.child = true;
  process.waiting = false;
  return absl::OkStatus();
}

std::string LocalCluster::LastWord(const Process& process) {
  constexpr int64_t kTail = 4096;
  std::ifstream file(process.log_file, std::ios::binary | std::ios::ate);
  const auto size = static_cast<int64_t>(file.tellg());
  file.seekg(std::max(process.log_start, size - kTail));
  const std::string tail((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const std::vector<std::string> lines = absl::StrSplit(tail, '\n', absl::SkipEmpty());
  return absl::StrCat(lines.empty() ? "without a word" : lines.back(), " (", process.log_file, ")");
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
          absl::StrCat(process.name, " ended at its start: ", LastWord(process)));
    }
    if (StopRequests() > 0) return absl::CancelledError("interrupted");
    std::this_thread::sleep_for(kPoll);
  }
  return absl::DeadlineExceededError(
      absl::StrCat(process.name, " does not answer; see ", process.log_file));
}

absl::Status LocalCluster::Save() const {
  SavedCluster saved{gateway_address_, controller_address_, replicas_, {}};
  for (const Process& process : processes_) saved.processes.push_back({process.name, process.pid});
  return model::ReplaceFile(PathOf("cluster.json"), WriteClusterFile(saved));
}

absl::Status LocalCluster::WaitReady(std::chrono::seconds limit) {
  auto stub =
      v1::StatusService::NewStub(MakeChannel(DialAddress(gateway_address_), options_.credentials));
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
    const std::string line = absl::StrCat("loading: experts ", experts, "/", experts_,
                                          ", attention ", attention, "/", attention_);
    if (line != last) say_(line);
    last = line;
    if (ready != 0) return absl::OkStatus();
    if (StopRequests() > 0) return absl::CancelledError("interrupted while loading");
    if (adopted_) Supervise();
    for (Process& process : processes_) {
      if (process.given_up || (!adopted_ && !Alive(process)))
        return absl::UnavailableError(absl::StrCat(process.name, " ended: ", LastWord(process)));
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
                        " times within a minute and is left down: ", LastWord(process)));
      continue;
    }
    // Doubling, up to 1.6 s.
    const auto delay =
        std::chrono::milliseconds(100) * (1 << std::min<size_t>(process.restarts.size(), 4));
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
      while (Alive(process) && steady_clock::now() < end && StopRequests() < 2) {
        std::this_thread::sleep_for(kPoll);
      }
      if (!Alive(process)) continue;
      say_(absl::StrCat(process.name, " does not stop: killed"));
      kill(process.pid, SIGKILL);
      while (Alive(process)) std::this_thread::sleep_for(kPoll);
    }
  };
  for (const char* prefix : {"gateway", "attention", "expert", "controller"}) wave(prefix);
  std::error_code error;
  std::filesystem::remove(PathOf("cluster.json"), error);
}

}  // namespace moebius::services
