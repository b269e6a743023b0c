#include "tests/services/process_cluster.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <signal.h>
#include <sys/inotify.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/file_io.h"
#include "moebius/v1/worker.grpc.pb.h"

namespace moebius::services {
namespace {

using std::chrono::steady_clock;
constexpr std::chrono::seconds kStartLimit(60);

int MillisecondsUntil(steady_clock::time_point end) {
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(end - steady_clock::now());
  return static_cast<int>(std::max<int64_t>(0, left.count()));
}

}  // namespace

const char* const kTestModel = MOEBIUS_SOURCE_DIR "/models/moebius-tiny";
const char* const kRandomModel = MOEBIUS_SOURCE_DIR "/tests/golden/kimi-k2";

ScopedFolder::ScopedFolder() {
  static std::atomic<int> counter{0};
  path_ = absl::StrCat(testing::TempDir(), "/moebius-", getpid(), "-", ++counter);
  std::filesystem::create_directories(path_);
}

ScopedFolder::~ScopedFolder() {
  std::error_code error;
  if (!testing::Test::HasFailure()) std::filesystem::remove_all(path_, error);
}

ScopedCluster::ScopedCluster(LocalClusterOptions options) {
  if (options.model.empty()) options.model = kTestModel;
  options.listen = "127.0.0.1:0";
  options.binaries = MOEBIUS_BINARIES;
  options.state_dir = folder_.path();
  options_ = options;
  absl::StatusOr<LocalCluster> cluster = LocalCluster::Start(options, [](const std::string&) {});
  EXPECT_TRUE(cluster.ok()) << cluster.status();
  cluster_ = std::make_unique<LocalCluster>(*std::move(cluster));
  const absl::Status ready = cluster_->WaitReady(std::chrono::seconds(120));
  EXPECT_TRUE(ready.ok()) << ready;
}

ScopedCluster::~ScopedCluster() { cluster_->Drain(std::chrono::seconds(30)); }

std::unique_ptr<GenerationClient> ScopedCluster::Client() {
  ClientFlags flags;
  flags.address = cluster_->address();
  return *GenerationClient::Open(flags);
}

pid_t ScopedCluster::Pid(const std::string& name) const {
  for (const auto& process : cluster_->processes()) {
    if (process.name == name) return process.pid;
  }
  return 0;
}

std::map<std::string, uint64_t> ScopedCluster::Counters() {
  return services::Counters(cluster_->address());
}

std::map<std::string, uint64_t> Counters(const std::string& address) {
  auto stub =
      v1::StatusService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  v1::StatusReply reply;
  const grpc::Status status = stub->Status(&context, v1::StatusRequest(), &reply);
  EXPECT_TRUE(status.ok()) << status.error_message();
  std::map<std::string, uint64_t> counters;
  for (const v1::Counter& counter : reply.counters()) counters[counter.name()] = counter.value();
  return counters;
}

std::map<std::string, uint64_t> AwaitCounters(
    const std::string& address,
    const std::function<bool(const std::map<std::string, uint64_t>&)>& wanted,
    std::chrono::seconds limit) {
  const auto end = steady_clock::now() + limit;
  while (true) {
    std::map<std::string, uint64_t> counters = Counters(address);
    if (wanted(counters)) return counters;
    if (steady_clock::now() > end) {
      ADD_FAILURE() << "the counters did not become what was wanted within " << limit.count()
                    << " s";
      return counters;
    }
  }
}

uint64_t SumOf(const std::map<std::string, uint64_t>& counters, const std::string& suffix) {
  uint64_t sum = 0;
  for (const auto& [name, value] : counters) {
    if (absl::EndsWith(name, suffix)) sum += value;
  }
  return sum;
}

bool IsRunning(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  const std::string stat((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t name_end = stat.rfind(") ");
  return name_end != std::string::npos && stat[name_end + 2] != 'Z' && stat[name_end + 2] != 'X';
}

std::vector<pid_t> RunningWith(const std::string& text) {
  std::vector<pid_t> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    int pid = 0;
    if (!absl::SimpleAtoi(entry.path().filename().string(), &pid) || pid == getpid()) continue;
    std::ifstream file(entry.path() / "cmdline", std::ios::binary);
    const std::string command((std::istreambuf_iterator<char>(file)),
                              std::istreambuf_iterator<char>());
    if (absl::StrContains(command, text) && IsRunning(pid)) found.push_back(pid);
  }
  return found;
}

ServiceProcess::ServiceProcess(const ScopedFolder& folder, const std::string& name,
                               const std::string& binary, std::vector<std::string> arguments)
    : folder_(folder.path()),
      log_file_(absl::StrCat(folder_, "/", name, ".log")),
      port_file_(absl::StrCat(folder_, "/", name, ".address")) {
  const bool ours = binary[0] != '/';
  arguments.insert(arguments.begin(), ours ? absl::StrCat(MOEBIUS_BINARIES, "/", binary) : binary);
  if (ours && binary != "moebius") {
    arguments.insert(arguments.end(), {"--port-file", port_file_, "--model", kTestModel});
  }
  std::error_code error;
  std::filesystem::remove(port_file_, error);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const int log = open(log_file_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  pid_ = fork();
  if (pid_ == 0) {
    dup2(log, 1);
    dup2(log, 2);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(log);
  EXPECT_GT(pid_, 0);
  pid_fd_ = static_cast<int>(syscall(SYS_pidfd_open, pid_, 0));
  EXPECT_GE(pid_fd_, 0);
}

ServiceProcess::~ServiceProcess() {
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    (void)Wait();
  }
  close(pid_fd_);
}

void ServiceProcess::Signal(int signal) const {
  ASSERT_GT(pid_, 0);
  EXPECT_EQ(kill(pid_, signal), 0);
}

absl::Status ServiceProcess::AwaitFile(const std::function<bool()>& wanted,
                                       const std::string& what) {
  const int watch = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
  inotify_add_watch(watch, folder_.c_str(), IN_MOVED_TO | IN_MODIFY | IN_CLOSE_WRITE);
  const auto end = steady_clock::now() + kStartLimit;
  absl::Status status;
  while (!wanted()) {
    pollfd fds[2] = {{watch, POLLIN, 0}, {pid_fd_, POLLIN, 0}};
    const int ready = poll(fds, 2, MillisecondsUntil(end));
    if (ready > 0 && fds[1].revents != 0 && !wanted()) {
      status = absl::UnavailableError(absl::StrCat("ended before ", what, ": ", Log()));
    } else if (ready == 0) {
      status = absl::DeadlineExceededError(absl::StrCat("no ", what, ": ", Log()));
    }
    if (!status.ok()) break;
    char events[4096];
    while (read(watch, events, sizeof(events)) > 0) {
    }
  }
  close(watch);
  return status;
}

absl::StatusOr<std::string> ServiceProcess::Address() {
  std::string address;
  const absl::Status status = AwaitFile(
      [&] {
        const absl::StatusOr<std::string> text = model::ReadSmallFile(port_file_, 256);
        if (text.ok()) address = *text;
        return !address.empty();
      },
      "its address");
  if (!status.ok()) return status;
  return address;
}

absl::Status ServiceProcess::AwaitLog(const std::string& text) {
  return AwaitFile([&] { return absl::StrContains(Log(), text); }, text);
}

std::optional<int> ServiceProcess::Wait(std::chrono::seconds limit) {
  pollfd fd{pid_fd_, POLLIN, 0};
  if (poll(&fd, 1, static_cast<int>(limit.count()) * 1000) != 1) return std::nullopt;
  int status = 0;
  if (waitpid(pid_, &status, 0) != pid_) return std::nullopt;
  pid_ = 0;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

std::string ServiceProcess::Log() const {
  return model::ReadSmallFile(log_file_, 1 << 20).value_or("");
}

Result Generate(GenerationClient& client, const v1::GenerateRequest& request,
                const std::function<void(const v1::GenerateEvent&)>& on_event) {
  Result result;
  std::optional<steady_clock::time_point> last;
  result.status = client.Generate(request, [&](const v1::GenerateEvent& event) {
    if (on_event) on_event(event);
    result.preemptions = std::max<uint64_t>(result.preemptions, event.usage().preemptions());
    if (!event.has_token()) return;
    const auto now = steady_clock::now();
    if (last) result.longest_pause = std::max(result.longest_pause, now - *last);
    last = now;
    EXPECT_EQ(event.token_index(), result.ids.size());
    result.ids.push_back(event.token_id());
    result.digests.push_back(event.row_digest());
  });
  return result;
}

v1::GenerateRequest MakeRequest(int i, int64_t max_tokens) {
  v1::GenerateRequest request;
  Prng prng(static_cast<uint64_t>(i) + 1);
  const int length = 3 + static_cast<int>(prng.Below(i % 4 == 0 ? 200 : 40));
  for (int k = 0; k < length; ++k)
    request.mutable_token_ids()->add_ids(3 + static_cast<int32_t>(prng.Below(4000)));
  request.set_max_tokens(max_tokens);
  request.set_temperature(i % 2 == 0 ? 0.0f : 1.0f);
  request.set_seed(static_cast<uint64_t>(i) * 77);
  request.set_ignore_eos(true);
  return request;
}

std::unique_ptr<GenerationClient> OneProcess(const char* model) {
  ClientFlags flags;
  flags.model = model;
  absl::StatusOr<std::unique_ptr<GenerationClient>> client = GenerationClient::Open(flags);
  EXPECT_TRUE(client.ok()) << client.status();
  return *std::move(client);
}

std::vector<Result> Yardstick(int count, int64_t max_tokens) {
  const std::unique_ptr<GenerationClient> client = OneProcess();
  std::vector<Result> results;
  for (int i = 0; i < count; ++i) results.push_back(Generate(*client, MakeRequest(i, max_tokens)));
  return results;
}

void ExpectSame(const Result& got, const Result& expected, const std::string& what) {
  ASSERT_TRUE(got.status.ok()) << what << ": " << got.status;
  EXPECT_EQ(got.ids, expected.ids) << what;
  EXPECT_EQ(got.digests, expected.digests) << what;
}

std::vector<Result> Concurrently(const std::string& address, int count, int64_t max_tokens) {
  std::vector<Result> results(static_cast<size_t>(count));
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      ClientFlags flags;
      flags.address = address;
      const std::unique_ptr<GenerationClient> client = *GenerationClient::Open(flags);
      results[static_cast<size_t>(i)] = Generate(*client, MakeRequest(i, max_tokens));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

}  // namespace moebius::services
