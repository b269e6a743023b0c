// Goal: however `moebius up` and `moebius demo` end, short of SIGKILL, no service of theirs is
// left, and what a killed one leaves has exactly one owner at a time. Method: the real command,
// where needed with a stand-in for one service, so that the moment of the signal does not matter:
// an expert worker that never gets ready, one that ignores SIGTERM, a gateway that never listens.

#include <arpa/inet.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/unique_handle.h"
#include "gtest/gtest.h"
#include "services/cli/cluster_file.h"
#include "tests/services/process_cluster.h"

namespace moebius::services {
namespace {

class NoProcessLeft : public testing::Test {
 protected:
  std::unique_ptr<ServiceProcess> Up(const std::string& name, std::vector<std::string> more = {},
                                     const std::string& binary = "moebius") {
    std::vector<std::string> arguments{"up", "--model", kTestModel, "--state-dir", state_.path()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    if (std::find(more.begin(), more.end(), "--address") == more.end()) {
      arguments.insert(arguments.end(), {"--address", "127.0.0.1:0"});
    }
    return std::make_unique<ServiceProcess>(folder_, name, binary, std::move(arguments));
  }
  // The command in a folder of binaries of which one is a script that runs `line` and then waits
  // for ever, in the shell itself, so that no child of it can be left.
  std::string WithStandIn(const std::string& service, const std::string& line) {
    const std::string dir = folder_.path() + "/bin";
    std::filesystem::create_directories(dir);
    for (const char* name : {"controller", "gateway", "attention", "expert"}) {
      const std::string binary = absl::StrCat("/moebius-", name);
      if (name != service) {
        std::filesystem::create_symlink(MOEBIUS_BINARIES + binary, dir + binary);
        continue;
      }
      EXPECT_EQ(mkfifo((dir + "/never").c_str(), 0600), 0);
      std::ofstream(dir + binary) << "#!/bin/sh\n"
                                  << line << "\necho >" << folder_.path()
                                  << "/stands\nread nothing <" << dir << "/never\n";
      std::filesystem::permissions(dir + binary, std::filesystem::perms::owner_all);
    }
    std::filesystem::copy_file(MOEBIUS_BINARIES "/moebius", dir + "/moebius");
    return dir + "/moebius";
  }
  absl::Status AwaitStandIn(ServiceProcess& up) {
    return up.AwaitFile([&] { return std::filesystem::exists(folder_.path() + "/stands"); },
                        "the stand-in's word");
  }
  absl::StatusOr<SavedCluster> Saved() { return ReadClusterFile(state_.path() + "/cluster.json"); }
  void ExpectNothingLeft() {
    EXPECT_EQ(RunningWith(state_.path()).size(), 0u);
    EXPECT_FALSE(std::filesystem::exists(state_.path() + "/cluster.json"));
  }
  // A test that failed leaves no services behind either.
  void TearDown() override {
    for (pid_t pid : RunningWith(state_.path())) kill(pid, SIGKILL);
  }

  ScopedFolder folder_, state_;
};

TEST_F(NoProcessLeft, WhenThePortIsTaken) {
  const UniqueFd taken(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(bind(taken.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(taken.get(), 1), 0);
  ASSERT_EQ(getsockname(taken.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  const std::string port = absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
  const auto up = Up("up", {"--address", port});
  EXPECT_EQ(up->Wait(), 1) << up->Log();
  EXPECT_TRUE(absl::StrContains(up->Log(), "gateway ended at its start: ")) << up->Log();
  EXPECT_TRUE(absl::StrContains(up->Log(), "cannot listen on " + port)) << up->Log();
  ExpectNothingLeft();
  // The log still has that line, which is no word of the next one.
  const std::string moebius = WithStandIn("gateway", "exit 3");
  const auto silent = Up("silent", {"--address", port}, moebius);
  EXPECT_EQ(silent->Wait(), 1);
  EXPECT_TRUE(absl::StrContains(silent->Log(), "gateway ended at its start: without a word"))
      << silent->Log();
  std::filesystem::remove(folder_.path() + "/bin/moebius-gateway");
  const auto missing = Up("missing", {"--address", port}, moebius);
  EXPECT_EQ(missing->Wait(), 1);
  EXPECT_TRUE(absl::StrContains(missing->Log(), "cannot be run")) << missing->Log();
  ExpectNothingLeft();
}

TEST_F(NoProcessLeft, WhenInterruptedWhileLoading) {
  const auto up = Up("up", {}, WithStandIn("expert", ""));
  ASSERT_TRUE(up->AwaitLog("loading: ").ok()) << up->Log();
  const absl::StatusOr<SavedCluster> saved = Saved();
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->processes.size(), 5u);
  for (const SavedProcess& process : saved->processes) EXPECT_TRUE(IsRunning(process.pid));
  up->Signal(SIGINT);
  EXPECT_EQ(up->Wait(), 130) << up->Log();
  EXPECT_FALSE(absl::StrContains(up->Log(), "killed")) << up->Log();
  ExpectNothingLeft();
}

TEST_F(NoProcessLeft, WhenInterruptedTwiceWhileAServiceDoesNotStop) {
  const auto up = Up("up", {}, WithStandIn("gateway", "trap '' TERM"));
  // The gateway never listens: the start itself is interrupted.
  ASSERT_TRUE(AwaitStandIn(*up).ok()) << up->Log();
  up->Signal(SIGTERM);
  up->Signal(SIGINT);
  EXPECT_EQ(up->Wait(), 130) << up->Log();
  EXPECT_TRUE(absl::StrContains(up->Log(), "gateway does not stop: killed")) << up->Log();
  ExpectNothingLeft();
}

TEST_F(NoProcessLeft, WhenAKilledOneHadNotFinishedItsStart) {
  const auto first = Up("first", {}, WithStandIn("gateway", ""));
  ASSERT_TRUE(AwaitStandIn(*first).ok()) << first->Log();
  first->Signal(SIGKILL);
  EXPECT_EQ(first->Wait(), 128 + SIGKILL);
  const std::vector<pid_t> left = RunningWith(state_.path() + "/");
  EXPECT_EQ(left.size(), 2u) << "the controller and the gateway's stand-in";
  const auto rival = Up("rival");
  EXPECT_EQ(rival->Wait(), 1);
  EXPECT_TRUE(absl::StrContains(rival->Log(), "--adopt")) << rival->Log();

  const auto second = Up("second", {"--adopt"});
  ASSERT_TRUE(second->AwaitLog("ready at ").ok()) << second->Log();
  for (pid_t pid : left) EXPECT_FALSE(IsRunning(pid));
  second->Signal(SIGINT);
  EXPECT_EQ(second->Wait(), 0) << second->Log();
  ExpectNothingLeft();
}

TEST_F(NoProcessLeft, WhenAdoptedWithTheNumbersThatThereAre) {
  const auto first = Up("first", {"--experts", "3"});
  ASSERT_TRUE(first->AwaitLog("ready at ").ok()) << first->Log();
  const absl::StatusOr<SavedCluster> saved = Saved();
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->processes.size(), 6u);

  const auto beside = Up("beside", {"--adopt"});
  EXPECT_EQ(beside->Wait(), 1);
  EXPECT_TRUE(absl::StrContains(beside->Log(), "another supervisor")) << beside->Log();

  first->Signal(SIGKILL);
  EXPECT_EQ(first->Wait(), 128 + SIGKILL);
  for (const char* flag : {"--experts", "--attention"}) {
    const auto other = Up("other", {"--adopt", flag, "2"});
    EXPECT_EQ(other->Wait(), 1);
    EXPECT_TRUE(absl::StrContains(other->Log(), "--attention 1 --experts 3")) << other->Log();
  }
  EXPECT_EQ(*Saved(), *saved) << "refused, and nothing touched";
  for (const SavedProcess& process : saved->processes) EXPECT_TRUE(IsRunning(process.pid));

  // One dies unwatched; the next supervisor brings it back rather than giving up the others.
  for (const SavedProcess& process : saved->processes) {
    if (process.name == "expert-2") kill(process.pid, SIGKILL);
  }
  const auto second = Up("second", {"--adopt"});
  ASSERT_TRUE(second->AwaitLog("restarted expert-2").ok()) << second->Log();
  ASSERT_TRUE(second->AwaitLog("ready at ").ok()) << second->Log();
  second->Signal(SIGTERM);
  EXPECT_EQ(second->Wait(), 0) << second->Log();
  ExpectNothingLeft();
}

TEST_F(NoProcessLeft, WhenADemoIsInterrupted) {
  for (const int signal : {SIGINT, SIGHUP}) {
    ServiceProcess demo(folder_, "demo", "moebius", {"demo", "--model", kTestModel});
    const std::string state = absl::StrCat("moebius-demo-", demo.pid());
    ASSERT_TRUE(demo.AwaitLog("gateway at ").ok()) << demo.Log();
    EXPECT_EQ(RunningWith(state).size(), 5u);
    demo.Signal(signal);
    EXPECT_EQ(demo.Wait(), 130) << demo.Log();
    EXPECT_EQ(RunningWith(state).size(), 0u);
  }
}

}  // namespace
}  // namespace moebius::services
