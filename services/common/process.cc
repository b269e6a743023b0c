#include "services/common/process.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "model/file_io.h"

namespace moebius::services {
namespace {

std::atomic<bool> failed{false};

sigset_t StopSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

}  // namespace

void BlockStopSignals() {
  const sigset_t set = StopSignals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

void WaitForStop() {
  const sigset_t set = StopSignals();
  int received = 0;
  sigwait(&set, &received);
  LOG_INFO("draining");
  std::thread([set] {
    int again = 0;
    sigwait(&set, &again);
    _exit(130);
  }).detach();
}

void EndAfterFailure(const absl::Status& why) {
  if (failed.exchange(true)) return;
  LOG_ERROR(absl::StrCat("cannot go on: ", why.ToString()));
  kill(getpid(), SIGTERM);
}

int ExitCode() { return failed.load() ? 1 : 0; }

absl::Status PublishAddress(const std::string& path, const std::string& address) {
  if (path.empty()) return absl::OkStatus();
  return model::ReplaceFile(path, address);
}

}  // namespace moebius::services
