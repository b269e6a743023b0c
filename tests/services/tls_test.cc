// Goal: with TLS flags every service speaks mutual TLS and nothing else; without them no service
// listens beyond loopback unless told to. Method: certificates made by the openssl command (a
// dependency of Debian's ca-certificates), real processes.

#include <signal.h>

#include <cstdlib>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/file_io.h"
#include "tests/services/process_cluster.h"
#include "tests/services/raw_call.h"

namespace moebius::services {
namespace {

// A key and a self-signed certificate, which is its own authority.
ListenOptions MakeIdentity(const ScopedFolder& folder, const std::string& name) {
  ListenOptions options;
  options.tls_key = absl::StrCat(folder.path(), "/", name, ".key");
  options.tls_cert = absl::StrCat(folder.path(), "/", name, ".pem");
  options.tls_ca = options.tls_cert;
  const std::string command = absl::StrCat(
      "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "
      "/CN=",
      name, " -addext subjectAltName=IP:127.0.0.1 -keyout ", options.tls_key, " -out ",
      options.tls_cert, " 2>/dev/null");
  EXPECT_EQ(std::system(command.c_str()), 0) << command;
  return options;
}

std::vector<std::string> Flags(const ListenOptions& tls) {
  return {"--tls-cert", tls.tls_cert, "--tls-key", tls.tls_key, "--tls-ca", tls.tls_ca};
}

std::vector<std::string> operator+(std::vector<std::string> a, const std::vector<std::string>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

grpc::Status AskHealth(const std::shared_ptr<grpc::Channel>& channel) {
  return RawCall(channel, "/grpc.health.v1.Health/Check", "").status;
}

std::shared_ptr<grpc::Channel> OneSided(const std::string& address, const std::string& ca_file) {
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = *model::ReadSmallFile(ca_file, 1 << 20);
  return grpc::CreateChannel(address, grpc::SslCredentials(ssl));
}

TEST(Tls, AClusterSpeaksMutualTlsAndNothingElse) {
  const ScopedFolder folder;
  const ListenOptions ours = MakeIdentity(folder, "ours");
  const ListenOptions foreign = MakeIdentity(folder, "foreign");
  ServiceProcess controller(folder, "controller", "moebius-controller", Flags(ours));
  const auto controller_address = controller.Address();
  ASSERT_TRUE(controller_address.ok()) << controller_address.status();
  const std::vector<std::string> flags =
      Flags(ours) + std::vector<std::string>{"--controller", *controller_address};
  ServiceProcess gateway(folder, "gateway", "moebius-gateway", flags);
  ServiceProcess attention(folder, "attention", "moebius-attention", flags);
  ServiceProcess expert(folder, "expert", "moebius-expert", flags);
  const auto address = gateway.Address();
  ASSERT_TRUE(address.ok()) << address.status();

  RawStream watch(MakeChannel(*address, ours), "/grpc.health.v1.Health/Watch", "");
  for (std::string status; status != std::string("\x08\x01", 2);) {
    const std::optional<std::string> next = watch.Read();
    ASSERT_TRUE(next.has_value()) << gateway.Log();
    status = *next;
  }
  ClientFlags client;
  client.address = *address;
  client.credentials = ours;
  ExpectSame(Generate(**GenerationClient::Open(client), MakeRequest(1)),
             Generate(*OneProcess(), MakeRequest(1)), "over TLS");

  const auto attention_address = attention.Address();
  const auto expert_address = expert.Address();
  ASSERT_TRUE(attention_address.ok() && expert_address.ok());
  ListenOptions stranger = foreign;
  stranger.tls_ca = ours.tls_ca;  // trusts us; we do not know it
  for (const std::string& server :
       {*address, *controller_address, *attention_address, *expert_address}) {
    EXPECT_TRUE(AskHealth(MakeChannel(server, ours)).ok()) << server;
    EXPECT_EQ(
        AskHealth(grpc::CreateChannel(server, grpc::InsecureChannelCredentials())).error_code(),
        grpc::StatusCode::UNAVAILABLE)
        << "plain text";
    EXPECT_EQ(AskHealth(OneSided(server, ours.tls_ca)).error_code(), grpc::StatusCode::UNAVAILABLE)
        << "no certificate";
    EXPECT_EQ(AskHealth(MakeChannel(server, stranger)).error_code(), grpc::StatusCode::UNAVAILABLE)
        << "a certificate of another authority";
    EXPECT_EQ(AskHealth(MakeChannel(server, foreign)).error_code(), grpc::StatusCode::UNAVAILABLE)
        << "a server of another authority";
  }
}

// A test that failed leaves no services behind.
void KillAllOf(const ScopedFolder& state) {
  for (pid_t pid : RunningWith(state.path())) kill(pid, SIGKILL);
}

// What `moebius up` prints last: "ready at <address>".
std::string ReadyAt(const ServiceProcess& up) {
  const std::string log = up.Log();
  const size_t at = log.rfind("ready at ") + 9;
  return log.substr(at, log.find('\n', at) - at);
}

TEST(Tls, UpStatsAndClientsSpeakItToo) {
  const ScopedFolder folder, state;
  const auto cleanup = absl::MakeCleanup([&] { KillAllOf(state); });
  const ListenOptions ours = MakeIdentity(folder, "ours");
  // Beyond loopback TLS is enough; the supervisor itself calls an address that the certificate has.
  ServiceProcess up(folder, "up", "moebius",
                    std::vector<std::string>{"up", "--model", kTestModel, "--address", "0.0.0.0:0",
                                             "--state-dir", state.path()} +
                        Flags(ours));
  ASSERT_TRUE(up.AwaitLog("ready at ").ok()) << up.Log();
  const std::string bound = ReadyAt(up);
  const std::string address = absl::StrCat("127.0.0.1", bound.substr(bound.rfind(':')));
  EXPECT_EQ(
      AskHealth(grpc::CreateChannel(address, grpc::InsecureChannelCredentials())).error_code(),
      grpc::StatusCode::UNAVAILABLE)
      << "plain text";
  const std::vector<std::string> at{"--address", address};
  const auto run = [&](const std::string& name, std::vector<std::string> command, int code) {
    ServiceProcess process(folder, name, "moebius", command + at);
    EXPECT_EQ(process.Wait(), code) << name << ": " << process.Log();
    return process.Log();
  };
  const std::vector<std::string> generate{"generate", "--prompt", "x", "--max-tokens", "2"};
  run("generate", generate + Flags(ours), 0);
  EXPECT_TRUE(absl::StrContains(run("stats", std::vector<std::string>{"stats"} + Flags(ours), 0),
                                "\ntokens_out 2\n"));
  run("plain-generate", generate, 1);
  run("plain-stats", {"stats"}, 1);
  for (const char* command : {"stats", "generate"}) {
    std::vector<std::string> half = {command, "--tls-cert", ours.tls_cert};
    if (half[0] == "generate") half = half + std::vector<std::string>{"--prompt", "x"};
    EXPECT_TRUE(absl::StrContains(run("half", half, 1), "go together"));
  }
  up.Signal(SIGKILL);
  EXPECT_EQ(up.Wait(), 128 + SIGKILL);
  const std::vector<std::string> adopt{"up",         "--adopt",     "--model",
                                       kTestModel,   "--address",   "0.0.0.0:0",
                                       "--insecure", "--state-dir", state.path()};
  ServiceProcess plain(folder, "plain", "moebius", adopt);
  EXPECT_EQ(plain.Wait(), 1);
  EXPECT_TRUE(absl::StrContains(plain.Log(), "speaks TLS")) << plain.Log();
  ServiceProcess next(folder, "next", "moebius", adopt + Flags(ours));
  ASSERT_TRUE(next.AwaitLog("ready at ").ok()) << next.Log();
  EXPECT_EQ(ReadyAt(next), bound);
  next.Signal(SIGTERM);
  EXPECT_EQ(next.Wait(), 0) << next.Log();
  EXPECT_EQ(RunningWith(state.path()).size(), 0u);
}

TEST(Tls, UpBindsBeyondLoopbackOnlyWhenToldTo) {
  const ScopedFolder folder, state;
  const auto cleanup = absl::MakeCleanup([&] { KillAllOf(state); });
  const std::vector<std::string> command{"up",        "--model",     kTestModel,  "--address",
                                         "0.0.0.0:0", "--state-dir", state.path()};
  ServiceProcess refused(folder, "refused", "moebius", command);
  EXPECT_EQ(refused.Wait(), 1);
  EXPECT_TRUE(absl::StrContains(refused.Log(), "--insecure")) << refused.Log();
  EXPECT_FALSE(absl::StrContains(refused.Log(), "starting")) << "before anything is started";
  ServiceProcess up(folder, "up", "moebius", command + std::vector<std::string>{"--insecure"});
  ASSERT_TRUE(up.AwaitLog("ready at ").ok()) << up.Log();
  EXPECT_TRUE(absl::StartsWith(ReadyAt(up), "0.0.0.0:")) << up.Log();
  up.Signal(SIGTERM);
  EXPECT_EQ(up.Wait(), 0) << up.Log();
}

TEST(Tls, CredentialsThatCannotBeReadAreNoReasonForPlainText) {
  const ScopedFolder folder;
  ServiceProcess controller(folder, "controller", "moebius-controller", {});
  const auto address = controller.Address();
  ASSERT_TRUE(address.ok()) << address.status();
  ASSERT_TRUE(AskHealth(MakeChannel(*address, ListenOptions())).ok());
  const ListenOptions good = MakeIdentity(folder, "client");
  for (std::string ListenOptions::*field :
       {&ListenOptions::tls_cert, &ListenOptions::tls_key, &ListenOptions::tls_ca}) {
    ListenOptions options = good;
    options.*field = folder.path() + "/missing.pem";
    EXPECT_FALSE(AskHealth(MakeChannel(*address, options)).ok());
    ListenOptions only;
    only.*field = good.*field;
    EXPECT_FALSE(AskHealth(MakeChannel(*address, only)).ok());
  }
}

TEST(Tls, ABindBeyondLoopbackNeedsTlsOrInsecure) {
  const ScopedFolder folder;
  const auto refuses = [&](const std::string& role, std::vector<std::string> flags,
                           const std::string& why) {
    if (role != "controller")
      flags = flags + std::vector<std::string>{"--controller", "127.0.0.1:1"};
    ServiceProcess process(folder, role, "moebius-" + role, flags);
    EXPECT_EQ(process.Wait(), 1) << role << ": " << process.Log();
    EXPECT_TRUE(absl::StrContains(process.Log(), why)) << role << ": " << process.Log();
  };
  for (const char* role : {"controller", "gateway", "attention", "expert"}) {
    refuses(role, {"--listen", "0.0.0.0:0"}, "--insecure");
  }
  for (const char* address : {"[::]:0", "127.example.org:0", "127.0.0.1.example.org:0",
                              "localhost.example.org:0", "dns:///0.0.0.0:0"}) {
    refuses("controller", {"--listen", address}, "--insecure");
  }
  const ListenOptions tls = MakeIdentity(folder, "ours");
  refuses("controller", {"--listen", "0.0.0.0:0", "--tls-cert", tls.tls_cert}, "go together");
  refuses("controller", {"--tls-cert", tls.tls_cert, "--tls-key", tls.tls_key}, "go together");
  ListenOptions broken = tls;
  broken.tls_key = folder.path() + "/missing.pem";
  refuses("controller", Flags(broken), "missing.pem");
  ASSERT_TRUE(model::ReplaceFile(broken.tls_key, "no key at all").ok());
  refuses("controller", Flags(broken), "cannot listen");

  ServiceProcess insecure(folder, "insecure", "moebius-controller",
                          {"--listen", "0.0.0.0:0", "--insecure"});
  EXPECT_TRUE(insecure.Address().ok()) << insecure.Log();
  ServiceProcess secure(folder, "secure", "moebius-controller",
                        Flags(tls) + std::vector<std::string>{"--listen", "0.0.0.0:0"});
  EXPECT_TRUE(secure.Address().ok()) << secure.Log();
}

}  // namespace
}  // namespace moebius::services
