// Goal: a step that stalls is cut off once, one that ends in time is not, and time in which this
// process itself was stopped is nobody's fault. Method: a child process that is stopped for longer
// than the limit.

#include "services/common/stall_watch.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "gtest/gtest.h"

namespace moebius::services {
namespace {

using std::chrono::milliseconds;

// Waits without being woken, as a thread in a read does.
void Pass(milliseconds time) {
  std::mutex mutex;
  std::condition_variable never;
  std::unique_lock<std::mutex> lock(mutex);
  never.wait_for(lock, time, [] { return false; });
}

TEST(StallWatchTest, CutsOffWhatStallsAndNothingElse) {
  StallWatch watch(milliseconds(200));
  std::atomic<int> cuts{0}, others{0};
  StallWatch::Stream stalled(watch, [&] { ++cuts; });
  StallWatch::Stream idle(watch, [&] { ++others; });
  StallWatch::Stream ended(watch, [&] { ++others; });
  ended.Begin();
  ended.End();
  stalled.Begin();
  const auto begin = std::chrono::steady_clock::now();
  while (cuts == 0) Pass(milliseconds(5));
  EXPECT_GE(std::chrono::steady_clock::now() - begin, milliseconds(200));
  Pass(milliseconds(300));
  EXPECT_EQ(cuts, 1) << "once";
  EXPECT_EQ(others, 0);
}

TEST(StallWatchTest, ThePauseOfItsOwnProcessDoesNotCount) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    StallWatch watch(milliseconds(2000));
    std::atomic<bool> cut{false};
    StallWatch::Stream stream(watch, [&] { cut = true; });
    stream.Begin();
    kill(getpid(), SIGSTOP);
    // What came meanwhile is read a moment after the process goes on.
    Pass(milliseconds(300));
    stream.End();
    _exit(cut ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, WUNTRACED), child);
  ASSERT_TRUE(WIFSTOPPED(status));
  Pass(milliseconds(3000));
  kill(child, SIGCONT);
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0) << "the stream was cut off for a pause of its own process";
}

}  // namespace
}  // namespace moebius::services
