// Goal: processes die and hang all the time, several at once too, and every stream that a client
// asks for comes whole and to the bit. Method: a seed draws faults (SIGKILL, or SIGSTOP and SIGCONT
// a while later, of any process) while clients ask for streams; ids and row digests against one
// process. Short here; `./dev chaos SECONDS SEED` runs it for longer.

#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/prng.h"
#include "gtest/gtest.h"
#include "tests/services/process_cluster.h"

namespace moebius::services {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr int kClients = 4;
constexpr int kRequests = 12;
constexpr int64_t kTokens = 300;

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  uint64_t value = 0;
  return text != nullptr && absl::SimpleAtoi(text, &value) ? value : otherwise;
}

struct Tally {
  std::mutex mutex;
  uint64_t streams = 0;
  uint64_t tokens = 0;
  std::vector<double> pauses_ms;  // the longest of each stream
};

// Streams one after another until told to stop; each a beginning of what one process generates.
void AskForStreams(ScopedCluster& cluster, const std::vector<Result>& expected, uint64_t seed,
                   const std::atomic<bool>& stop, Tally& tally) {
  Prng prng(seed);
  while (!stop && !testing::Test::HasFailure()) {
    const auto which = static_cast<int>(prng.Below(kRequests));
    const int64_t tokens = 20 + static_cast<int64_t>(prng.Below(kTokens - 20));
    const Result result = Generate(*cluster.Client(), MakeRequest(which, tokens));
    Result whole = expected[static_cast<size_t>(which)];
    whole.ids.resize(static_cast<size_t>(tokens));
    whole.digests.resize(static_cast<size_t>(tokens));
    ExpectSame(result, whole, absl::StrCat("request ", which, ", ", tokens, " tokens"));
    std::lock_guard<std::mutex> lock(tally.mutex);
    ++tally.streams;
    tally.tokens += result.ids.size();
    tally.pauses_ms.push_back(
        std::chrono::duration<double, std::milli>(result.longest_pause).count());
  }
}

TEST(Chaos, NothingIsLostAndNothingDiffers) {
  const uint64_t seconds = FromEnvironment("MOEBIUS_CHAOS_SECONDS", 15);
  const uint64_t seed = FromEnvironment("MOEBIUS_CHAOS_SEED", 1);
  const std::vector<Result> expected = Yardstick(kRequests, kTokens);
  LocalClusterOptions options;
  options.attention = 2;
  options.experts = 3;
  options.replicas = 2;
  options.restarts_per_minute = 1000;
  ScopedCluster cluster(options);
  std::vector<std::string> names;
  for (const auto& process : cluster->processes()) names.push_back(process.name);

  std::atomic<bool> stop{false};
  Tally tally;
  std::vector<std::thread> clients;
  for (int i = 0; i < kClients; ++i) {
    clients.emplace_back([&, i] {
      AskForStreams(cluster, expected, seed * 1000 + static_cast<uint64_t>(i), stop, tally);
    });
  }
  Prng prng(seed);
  std::map<std::string, int> faults;                  // "SIGKILL gateway"
  std::map<pid_t, steady_clock::time_point> stopped;  // to be continued then
  std::mutex mutex;
  std::condition_variable never;
  std::unique_lock<std::mutex> lock(mutex);
  const auto end = steady_clock::now() + std::chrono::seconds(seconds);
  auto next_fault = steady_clock::now() + milliseconds(500);
  while (steady_clock::now() < end && !HasFailure()) {
    never.wait_for(lock, milliseconds(10));
    const auto now = steady_clock::now();
    for (auto it = stopped.begin(); it != stopped.end();) {
      if (now < it->second) {
        ++it;
        continue;
      }
      kill(it->first, SIGCONT);
      it = stopped.erase(it);
    }
    cluster->Supervise();
    if (now < next_fault) continue;
    next_fault = now + milliseconds(300 + prng.Below(1200));
    const std::string& name = names[prng.Below(names.size())];
    const bool kills = prng.Below(3) != 0;
    const milliseconds pause(100 + prng.Below(2400));
    const pid_t pid = cluster.Pid(name);
    if (pid <= 0 || !IsRunning(pid) || stopped.count(pid) > 0) continue;
    if (!kills) stopped[pid] = now + pause;
    EXPECT_EQ(kill(pid, kills ? SIGKILL : SIGSTOP), 0);
    ++faults[absl::StrCat(kills ? "SIGKILL " : "SIGSTOP ", name.substr(0, name.find('-')))];
  }
  for (const auto& [pid, until] : stopped) kill(pid, SIGCONT);
  // What is under way ends well too.
  stop = true;
  std::atomic<bool> ended{false};
  std::thread waiter([&] {
    for (std::thread& client : clients) client.join();
    ended = true;
  });
  while (!ended) {
    never.wait_for(lock, milliseconds(10));
    cluster->Supervise();
  }
  waiter.join();

  int total = 0;
  for (const auto& [fault, count] : faults) {
    std::printf("%s: %d\n", fault.c_str(), count);
    total += count;
  }
  std::sort(tally.pauses_ms.begin(), tally.pauses_ms.end());
  const auto quantile = [&](double q) {
    return tally.pauses_ms.empty() ? 0.0
                                   : tally.pauses_ms[static_cast<size_t>(
                                         q * static_cast<double>(tally.pauses_ms.size() - 1))];
  };
  std::printf(
      "seed %lu: %d faults in %lu s, %lu streams of %lu tokens, %s; the longest pause of a "
      "stream: median %.0f ms, 90%% %.0f ms, most %.0f ms\n",
      seed, total, seconds, tally.streams, tally.tokens,
      HasFailure() ? "NOT all whole and equal" : "all whole and equal", quantile(0.5),
      quantile(0.9), quantile(1));
  EXPECT_GT(total, 0);
  EXPECT_GT(tally.streams, 0u);
}

}  // namespace
}  // namespace moebius::services
