#include "services/common/process.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "base/log.h"
#include "model/file_io.h"

namespace moebius::services {
namespace {

std::atomic<bool> stopping{false};

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
  stopping.store(true);
  LOG_INFO("draining");
  std::thread([set] {
    int again = 0;
    sigwait(&set, &again);
    _exit(130);
  }).detach();
}

bool Stopping() { return stopping.load(); }

absl::Status PublishAddress(const std::string& path, const std::string& address) {
  if (path.empty()) return absl::OkStatus();
  return model::ReplaceFile(path, address);
}

}  // namespace moebius::services
