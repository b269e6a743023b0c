// moebius generate, chat and score.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"
#include "services/cli/commands.h"
#include "services/cli/generation_client.h"
#include "services/cli/tls_flags.h"
#include "services/cli/token_ids_file.h"

namespace moebius::services {
namespace {

struct GenerateFlags {
  ClientFlags client;
  std::string prompt;
  std::string token_ids;
  int64_t max_tokens = 128;
  float temperature = 0;
  int top_k = 0;
  float top_p = 1;
  uint64_t seed = 0;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  int64_t deadline_ms = 0;
  bool json = false;
  int top = 5;
};

// A flag that would have no effect is a mistake to be told: those of a client want --address, those
// of this process exclude it. --model may stay beside --address; the cluster's own model answers
// then.
void AddClientFlags(CLI::App& command, ClientFlags& flags) {
  command.add_option("--model", flags.model, "model directory")->check(CLI::ExistingDirectory);
  CLI::Option* address = command.add_option(
      "--address", flags.address, "gateway of a running cluster; without it, all in this process");
  AddTlsFlags(command, flags.credentials, address);
  command.add_option("--experts", flags.local.experts, "expert workers, in this process")
      ->check(CLI::Range(1, 256))
      ->excludes(address);
  command.add_option("--threads", flags.local.threads, "compute threads, in this process")
      ->check(CLI::Range(1, 256))
      ->excludes(address);
  command
      .add_option("--prefill-chunk", flags.local.prefill_chunk,
                  "rows of a prompt in one step, in this process")
      ->check(CLI::Range(1, 512))
      ->excludes(address);
}

void AddDeadlineFlag(CLI::App& command, GenerateFlags& flags) {
  command.add_option("--deadline-ms", flags.deadline_ms,
                     "give up after so long; 0: the gateway's default, in this process never");
}

// CLI11 would wrap a negative number and cut one that is too large.
std::string IsSeed(const std::string& text) {
  uint64_t seed = 0;
  return absl::SimpleAtoi(text, &seed) ? "" : absl::StrCat(text, " is not in [0, 2^64)");
}

void AddSamplingFlags(CLI::App& command, GenerateFlags& flags) {
  command.add_option("--max-tokens", flags.max_tokens);
  command.add_option("--temperature", flags.temperature, "0 is greedy");
  command.add_option("--top-k", flags.top_k);
  command.add_option("--top-p", flags.top_p);
  command.add_option("--seed", flags.seed)->check(IsSeed);
  command.add_option("--stop", flags.stop, "a string that ends the answer; may be repeated");
  AddDeadlineFlag(command, flags);
}

v1::GenerateRequest MakeRequest(const GenerateFlags& flags) {
  v1::GenerateRequest request;
  request.set_max_tokens(flags.max_tokens);
  request.set_temperature(flags.temperature);
  request.set_top_k(flags.top_k);
  request.set_top_p(flags.top_p);
  request.set_seed(flags.seed);
  for (const std::string& stop : flags.stop) request.add_stop(stop);
  request.set_ignore_eos(flags.ignore_eos);
  request.set_deadline_ms(flags.deadline_ms);
  return request;
}

const char* NameOf(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_LENGTH:
      return "length";
    case v1::FINISH_REASON_CANCELLED:
      return "cancelled";
    case v1::FINISH_REASON_DEADLINE:
      return "deadline";
    default:
      return "stop";
  }
}

int Report(const absl::Status& status) {
  if (status.ok()) return 0;
  std::cerr << "moebius: " << status.message() << "\n";
  return 1;
}

absl::Status RunGenerate(const GenerateFlags& flags) {
  v1::GenerateRequest request = MakeRequest(flags);
  if (!flags.token_ids.empty()) {
    ASSIGN_OR_RETURN(const std::vector<TokenId> ids, ReadTokenIds(flags.token_ids));
    request.mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  } else if (!flags.prompt.empty()) {
    request.set_text(flags.prompt);
  } else {
    return absl::InvalidArgumentError("give --prompt TEXT or --token-ids FILE");
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<GenerationClient> client,
                   GenerationClient::Open(flags.client));
  nlohmann::json out;
  out["token_ids"] = nlohmann::json::array();
  out["row_digests"] = nlohmann::json::array();
  std::string text;
  RETURN_IF_ERROR(client->Generate(request, [&](const v1::GenerateEvent& event) {
    text += event.text();
    if (!flags.json) std::cout << event.text() << std::flush;
    if (event.has_token()) {
      out["token_ids"].push_back(event.token_id());
      out["row_digests"].push_back(absl::StrFormat("%016x", event.row_digest()));
    }
    if (event.finish_reason() == v1::FINISH_REASON_UNSPECIFIED) return;
    out["finish_reason"] = NameOf(event.finish_reason());
    out["usage"] = {{"prompt_tokens", event.usage().prompt_tokens()},
                    {"completion_tokens", event.usage().completion_tokens()},
                    {"preemptions", event.usage().preemptions()}};
  }));
  out["text"] = text;
  std::cout << (flags.json ? out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
                           : "")
            << "\n";
  return absl::OkStatus();
}

absl::Status RunScore(const GenerateFlags& flags) {
  v1::ScoreRequest request;
  ASSIGN_OR_RETURN(const std::vector<TokenId> ids, ReadTokenIds(flags.token_ids));
  request.mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  request.set_top(flags.top);
  request.set_deadline_ms(flags.deadline_ms);
  ASSIGN_OR_RETURN(const std::unique_ptr<GenerationClient> client,
                   GenerationClient::Open(flags.client));
  ASSIGN_OR_RETURN(const v1::ScoreReply reply, client->Score(request));
  nlohmann::json out;
  out["next_logprob"] = nlohmann::json::array();
  out["top_ids"] = nlohmann::json::array();
  out["top_logprob"] = nlohmann::json::array();
  double sum = 0;
  for (int i = 0; i < reply.positions_size(); ++i) {
    const v1::ScorePosition& position = reply.positions(i);
    if (i + 1 < reply.positions_size()) {
      out["next_logprob"].push_back(position.next_logprob());
      sum += position.next_logprob();
    }
    out["top_ids"].push_back(
        std::vector<int32_t>(position.top_ids().begin(), position.top_ids().end()));
    out["top_logprob"].push_back(
        std::vector<float>(position.top_logprob().begin(), position.top_logprob().end()));
  }
  if (flags.json) {
    std::cout << out.dump() << "\n";
  } else {
    std::cout << absl::StrFormat(
        "%d tokens, log-probability %.4f, %.4f a token\n", reply.positions_size(), sum,
        reply.positions_size() > 1 ? sum / (reply.positions_size() - 1) : 0.0);
  }
  return absl::OkStatus();
}

absl::Status RunChat(const GenerateFlags& flags) {
  ASSIGN_OR_RETURN(const std::unique_ptr<GenerationClient> client,
                   GenerationClient::Open(flags.client));
  v1::ChatMessages history;
  std::string line;
  std::cerr << "An empty line or end of input leaves.\n> " << std::flush;
  while (std::getline(std::cin, line) && !line.empty()) {
    v1::ChatMessage* user = history.add_messages();
    user->set_role("user");
    user->set_content(line);
    v1::GenerateRequest request = MakeRequest(flags);
    *request.mutable_chat() = history;
    std::string answer;
    RETURN_IF_ERROR(client->Generate(request, [&](const v1::GenerateEvent& event) {
      answer += event.text();
      std::cout << event.text() << std::flush;
    }));
    v1::ChatMessage* assistant = history.add_messages();
    assistant->set_role("assistant");
    assistant->set_content(answer);
    std::cout << "\n";
    std::cerr << "> " << std::flush;
  }
  return absl::OkStatus();
}

}  // namespace

void AddGenerate(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* command = app.add_subcommand("generate", "continue a prompt");
  AddClientFlags(*command, flags->client);
  AddSamplingFlags(*command, *flags);
  CLI::Option* prompt = command->add_option("--prompt", flags->prompt, "text");
  command->add_option("--token-ids", flags->token_ids, "file with a JSON list of ids, or -")
      ->excludes(prompt);
  command->add_flag("--ignore-eos", flags->ignore_eos);
  command->add_flag("--json", flags->json);
  command->callback([flags, exit_code] { *exit_code = Report(RunGenerate(*flags)); });
}

void AddChat(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<GenerateFlags>();
  flags->temperature = 0.7f;
  flags->top_p = 0.9f;
  CLI::App* command = app.add_subcommand("chat", "talk on the terminal");
  AddClientFlags(*command, flags->client);
  AddSamplingFlags(*command, *flags);
  command->callback([flags, exit_code] { *exit_code = Report(RunChat(*flags)); });
}

void AddScore(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* command = app.add_subcommand("score", "log-probabilities of a given text");
  AddClientFlags(*command, flags->client);
  command->add_option("--token-ids", flags->token_ids, "file with a JSON list of ids, or -")
      ->required();
  command->add_option("--top", flags->top, "best tokens for each position")
      ->check(CLI::Range(0, 20));
  AddDeadlineFlag(*command, *flags);
  command->add_flag("--json", flags->json);
  command->callback([flags, exit_code] { *exit_code = Report(RunScore(*flags)); });
}

}  // namespace moebius::services
