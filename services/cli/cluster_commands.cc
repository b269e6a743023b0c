// moebius up, stats and demo.

#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "moebius/v1/worker.grpc.pb.h"
#include "services/cli/commands.h"
#include "services/cli/generation_client.h"
#include "services/cli/local_cluster.h"
#include "services/cli/tls_flags.h"

namespace moebius::services {
namespace {

// How often this process was asked to stop. Whoever holds services polls it and ends them.
std::atomic<int> stop_requests{0};

void OnStop(int) { ++stop_requests; }

void CatchStopSignals() {
  std::signal(SIGINT, OnStop);
  std::signal(SIGTERM, OnStop);
  std::signal(SIGPIPE, SIG_IGN);  // whoever reads the output may leave; the services must not stay
}

int Report(const absl::Status& status) {
  if (status.ok()) return 0;
  std::cerr << "moebius: " << status.message() << "\n";
  return stop_requests > 0 ? 130 : 1;
}

void Say(const std::string& line) { std::cerr << line << std::endl; }

absl::Status RunUp(LocalClusterOptions options) {
  CatchStopSignals();
  options.stop_requests = [] { return stop_requests.load(); };
  ASSIGN_OR_RETURN(LocalCluster cluster, LocalCluster::Start(options, Say));
  const absl::Status ready = cluster.WaitReady(std::chrono::seconds(600));
  if (!ready.ok()) {
    // What ran before us and cannot be reached now is left as it was found.
    if (!cluster.adopted() || stop_requests > 0) cluster.Drain(std::chrono::seconds(5));
    return ready;
  }
  std::cout << "ready at " << cluster.address() << std::endl;
  while (stop_requests == 0) {
    cluster.Supervise();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  Say("draining (Ctrl-C again kills the services)");
  cluster.Drain(std::chrono::seconds(40));
  return stop_requests == 1 ? absl::OkStatus() : absl::CancelledError("did not wait for the drain");
}

absl::StatusOr<std::map<std::string, uint64_t>> FetchCounters(const std::string& address,
                                                              const ListenOptions& credentials) {
  RETURN_IF_ERROR(CheckTlsFiles(credentials));
  auto stub = v1::StatusService::NewStub(MakeChannel(address, credentials));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::StatusReply reply;
  const grpc::Status status = stub->Status(&context, v1::StatusRequest(), &reply);
  if (!status.ok())
    return absl::UnavailableError(absl::StrCat(address, ": ", status.error_message()));
  std::map<std::string, uint64_t> counters;
  for (const v1::Counter& counter : reply.counters()) counters[counter.name()] = counter.value();
  return counters;
}

struct Run {
  std::vector<int32_t> ids;
  std::vector<uint64_t> digests;
  std::string text;
  friend bool operator==(const Run& a, const Run& b) {
    return a.ids == b.ids && a.digests == b.digests;
  }
};

absl::StatusOr<Run> Generate(GenerationClient& client, const v1::GenerateRequest& request) {
  Run run;
  RETURN_IF_ERROR(client.Generate(
      request,
      [&](const v1::GenerateEvent& event) {
        run.text += event.text();
        if (!event.has_token()) return;
        run.ids.push_back(event.token_id());
        run.digests.push_back(event.row_digest());
      },
      [] { return stop_requests > 0; }));
  return run;
}

// The prompts that ./dev demo shows: prose sampled with a seed, and a fact recalled greedily.
std::vector<v1::GenerateRequest> DemoRequests() {
  std::vector<v1::GenerateRequest> requests(2);
  requests[0].set_text("Mr. Holmes looked");
  requests[0].set_temperature(0.7f);
  requests[0].set_top_p(0.9f);
  requests[0].set_seed(7);
  requests[0].set_max_tokens(80);
  v1::ChatMessage* message = requests[1].mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content(
      "Remember the code of each one. The code of belora is 48213. The code of old mill is 775. "
      "The code of "
      "tarisen is 90614.\nWhat is the code of belora?");
  requests[1].set_max_tokens(16);
  return requests;
}

// Generates over the wire and says who computed what.
absl::StatusOr<std::vector<Run>> RunInProcesses(LocalCluster& cluster) {
  RETURN_IF_ERROR(cluster.WaitReady(std::chrono::seconds(120)));
  std::cout << "\nfive processes:";
  for (const LocalCluster::Process& process : cluster.processes())
    std::cout << " " << process.name << "(" << process.pid << ")";
  std::cout << "\ngateway at " << cluster.address() << std::endl;
  ClientFlags remote;
  remote.address = cluster.address();
  ASSIGN_OR_RETURN(const std::unique_ptr<GenerationClient> client, GenerationClient::Open(remote));
  std::vector<Run> runs;
  for (const v1::GenerateRequest& request : DemoRequests()) {
    ASSIGN_OR_RETURN(Run result, Generate(*client, request));
    std::cout << "\n> "
              << (request.has_text() ? request.text() : request.chat().messages(0).content())
              << "\n"
              << result.text << "\n";
    runs.push_back(std::move(result));
  }
  std::cout << "\n";
  ASSIGN_OR_RETURN(const auto counters, FetchCounters(cluster.address(), ListenOptions()));
  int idle = 0;
  int workers = 0;
  for (const auto& [name, value] : counters) {
    if (!absl::StartsWith(name, "expert/") || !absl::EndsWith(name, "/rows_served")) continue;
    ++workers;
    idle += value == 0 ? 1 : 0;
    std::cout << "expert worker " << name.substr(7, name.size() - 7 - 12) << " served " << value
              << " rows\n";
  }
  if (workers != cluster.experts() || idle > 0)
    return absl::InternalError("an expert worker served no rows");
  return runs;
}

absl::Status CompareWithOneProcess(const std::string& model, const std::vector<Run>& runs) {
  ClientFlags local;
  local.model = model;
  ASSIGN_OR_RETURN(const std::unique_ptr<GenerationClient> single, GenerationClient::Open(local));
  bool identical = true;
  size_t tokens = 0;
  const std::vector<v1::GenerateRequest> requests = DemoRequests();
  for (size_t i = 0; i < requests.size(); ++i) {
    ASSIGN_OR_RETURN(const Run again, Generate(*single, requests[i]));
    identical = identical && again == runs[i];
    tokens += again.ids.size();
  }
  std::cout << "the same prompts in one process: " << tokens << " tokens, ids and row digests "
            << (identical ? "identical" : "DIFFERENT") << "\n";
  return identical ? absl::OkStatus() : absl::InternalError("one process and five disagree");
}

absl::Status RunDemo(const std::string& model) {
  CatchStopSignals();
  std::signal(SIGHUP, OnStop);  // unlike a cluster of `up`, a demo's is of no use without it
  const std::string state =
      (std::filesystem::temp_directory_path() / absl::StrCat("moebius-demo-", getpid())).string();
  LocalClusterOptions options;
  options.model = model;
  options.listen = "127.0.0.1:0";
  options.state_dir = state;
  options.stop_requests = [] { return stop_requests.load(); };
  absl::Status status;
  {
    absl::StatusOr<LocalCluster> cluster = LocalCluster::Start(options, Say);
    status = cluster.status();
    if (status.ok()) {
      const absl::StatusOr<std::vector<Run>> runs = RunInProcesses(*cluster);
      status = runs.ok() ? CompareWithOneProcess(model, *runs) : runs.status();
      cluster->Drain(std::chrono::seconds(20));
    }
  }
  if (status.ok() || stop_requests > 0) {
    std::error_code error;
    std::filesystem::remove_all(state, error);
  } else {
    std::cerr << "logs are in " << state << "\n";
  }
  return status;
}

}  // namespace

void AddUp(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<LocalClusterOptions>();
  CLI::App* command = app.add_subcommand("up", "start and supervise a cluster on this machine");
  command->add_option("--model", options->model, "model directory")
      ->required()
      ->check(CLI::ExistingDirectory);
  command->add_option("--attention", options->attention, "attention workers")
      ->check(CLI::Range(1, 64));
  command->add_option("--experts", options->experts, "expert workers")->check(CLI::Range(1, 256));
  command
      ->add_option("--replicas", options->replicas,
                   "of each expert, on different workers: with two nothing waits when one dies")
      ->check(CLI::Range(1, 64));
  command->add_option("--address", options->listen,
                      "where the gateway listens; port 0 takes a free one");
  command->add_option("--state-dir", options->state_dir);
  command->add_flag("--insecure", options->credentials.insecure,
                    "allow plain text on an address that is not loopback");
  AddTlsFlags(*command, options->credentials);
  command->add_flag("--adopt", options->adopt, "take over a cluster that runs there already");
  command->add_option("--threads", options->threads, "compute threads of each worker")
      ->check(CLI::Range(1, 256));
  command->add_option("--prefill-chunk", options->prefill_chunk)->check(CLI::Range(1, 512));
  command
      ->add_option("--blocks", options->num_blocks, "latent-cache blocks of each attention worker")
      ->check(CLI::Range(1, 1 << 24));
  command->callback([options, exit_code] { *exit_code = Report(RunUp(*options)); });
}

void AddStats(CLI::App& app, int* exit_code) {
  struct Flags {
    std::string address = "127.0.0.1:8700";
    ListenOptions credentials;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("stats", "counters of a running cluster");
  command->add_option("--address", flags->address, "gateway");
  AddTlsFlags(*command, flags->credentials);
  command->callback([flags, exit_code] {
    const auto counters = FetchCounters(flags->address, flags->credentials);
    *exit_code = Report(counters.status());
    if (!counters.ok()) return;
    for (const auto& [name, value] : *counters) std::cout << name << " " << value << "\n";
  });
}

void AddDemo(CLI::App& app, int* exit_code) {
  auto model = std::make_shared<std::string>();
  CLI::App* command =
      app.add_subcommand("demo", "five processes, generated text, and the same in one process");
  command->add_option("--model", *model)->required()->check(CLI::ExistingDirectory);
  command->callback([model, exit_code] { *exit_code = Report(RunDemo(*model)); });
}

}  // namespace moebius::services
