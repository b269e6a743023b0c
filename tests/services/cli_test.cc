// Goal: the command line keeps its word: the two JSON formats that other tools build on, exit
// codes, and the same bytes in one process and from a cluster. Method: the real binary with its
// standard streams in files, beside the library's own answers.

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "gtest/gtest.h"
#include "model/file_io.h"
#include "model/json_value.h"
#include "tests/services/process_cluster.h"

namespace moebius::services {
namespace {

using model::JsonValue;

struct Finished {
  int code = -1;
  std::string out, err;
};

class Cli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    cluster_ = new ScopedCluster(LocalClusterOptions{});
    one_ = OneProcess().release();
  }
  static void TearDownTestSuite() {
    delete one_;
    delete cluster_;
  }

  // `moebius` with these arguments, run to its end.
  Finished Run(std::vector<std::string> arguments, const std::string& input = "") {
    const std::string stem = absl::StrCat(folder_.path(), "/run", ++runs_);
    EXPECT_TRUE(model::ReplaceFile(stem + ".in", input).ok());
    arguments.insert(arguments.begin(), MOEBIUS_BINARIES "/moebius");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
      dup2(open((stem + ".in").c_str(), O_RDONLY), 0);
      dup2(open((stem + ".out").c_str(), O_WRONLY | O_CREAT, 0644), 1);
      dup2(open((stem + ".err").c_str(), O_WRONLY | O_CREAT, 0644), 2);
      execv(argv[0], argv.data());
      _exit(127);
    }
    int status = 0;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    Finished finished;
    finished.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    finished.out = *model::ReadSmallFile(stem + ".out", 1 << 24);
    finished.err = *model::ReadSmallFile(stem + ".err", 1 << 24);
    return finished;
  }
  // In this process, then from the cluster: both must succeed with the same bytes.
  std::string RunBoth(const std::vector<std::string>& arguments, const std::string& input = "") {
    std::vector<std::string> local = arguments, remote = arguments;
    local.insert(local.end(), {"--model", kTestModel});
    remote.insert(remote.end(), {"--address", (*cluster_)->address()});
    const Finished here = Run(local, input);
    const Finished there = Run(remote, input);
    EXPECT_EQ(here.code, 0) << here.err;
    EXPECT_EQ(there.code, 0) << there.err;
    EXPECT_EQ(here.out, there.out);
    return here.out;
  }
  void ExpectFails(const std::vector<std::string>& arguments, int code, const std::string& says) {
    const Finished finished = Run(arguments);
    const std::string line = absl::StrJoin(arguments, " ");
    EXPECT_EQ(finished.code, code) << line << ": " << finished.err;
    EXPECT_TRUE(absl::StrContains(finished.err, says)) << line << ": " << finished.err;
    EXPECT_EQ(finished.out, "") << line;
  }
  std::string WriteIds(const std::vector<int32_t>& ids) {
    const std::string path = folder_.path() + "/ids.json";
    EXPECT_TRUE(model::ReplaceFile(path, AsJson(ids)).ok());
    return path;
  }
  static std::string AsJson(const std::vector<int32_t>& ids) {
    return absl::StrCat("[", absl::StrJoin(ids, ", "), "]\n");
  }
  // One object on one line, with exactly these members in any order.
  static JsonValue ParseLine(const std::string& out, std::vector<std::string> members) {
    EXPECT_EQ(std::count(out.begin(), out.end(), '\n'), 1);
    absl::StatusOr<JsonValue> json = model::ParseJson(out);
    EXPECT_TRUE(json.ok()) << json.status() << out;
    ExpectMembers(*json, std::move(members));
    return *std::move(json);
  }
  static void ExpectMembers(const JsonValue& json, std::vector<std::string> members) {
    ASSERT_NE(json.AsObject(), nullptr);
    std::vector<std::string> found;
    for (const auto& [key, value] : *json.AsObject()) found.push_back(key);
    std::sort(found.begin(), found.end());
    std::sort(members.begin(), members.end());
    EXPECT_EQ(found, members);
  }
  static std::vector<int32_t> Ids(const JsonValue& list) {
    std::vector<int32_t> ids;
    for (const JsonValue& item : *list.AsArray())
      ids.push_back(static_cast<int32_t>(*item.AsUint()));
    return ids;
  }
  static std::vector<float> Floats(const JsonValue& list) {
    std::vector<float> numbers;
    for (const JsonValue& item : *list.AsArray()) {
      double number = 0;
      EXPECT_TRUE(item.GetNumber(&number));
      numbers.push_back(static_cast<float>(number));
    }
    return numbers;
  }

  static inline ScopedCluster* cluster_ = nullptr;
  static inline GenerationClient* one_ = nullptr;
  ScopedFolder folder_;
  int runs_ = 0;
};

const std::vector<int32_t> kIds = {0, 350, 17, 1999, 4, 4095, 77};
const std::vector<std::string> kScoreMembers = {"next_logprob", "top_ids", "top_logprob"};
const std::vector<std::string> kGenerateMembers = {"token_ids", "text", "finish_reason", "usage",
                                                   "row_digests"};

TEST_F(Cli, ScoreHasItsFixedFormat) {
  const std::string out = RunBoth({"score", "--token-ids", WriteIds(kIds), "--top", "5", "--json"});
  const JsonValue json = ParseLine(out, kScoreMembers);
  v1::ScoreRequest request;
  request.mutable_token_ids()->mutable_ids()->Add(kIds.begin(), kIds.end());
  request.set_top(5);
  const absl::StatusOr<v1::ScoreReply> expected = one_->Score(request);
  ASSERT_TRUE(expected.ok()) << expected.status();

  const std::vector<float> next = Floats(*json.Find("next_logprob"));
  const JsonValue::Array& top_ids = *json.Find("top_ids")->AsArray();
  const JsonValue::Array& top_logprob = *json.Find("top_logprob")->AsArray();
  ASSERT_EQ(next.size(), kIds.size() - 1);
  ASSERT_EQ(top_ids.size(), kIds.size());
  ASSERT_EQ(top_logprob.size(), kIds.size());
  for (size_t i = 0; i < kIds.size(); ++i) {
    const v1::ScorePosition& position = expected->positions(static_cast<int>(i));
    if (i < next.size()) {
      EXPECT_EQ(next[i], position.next_logprob()) << i;
    }
    const std::vector<float> best(position.top_logprob().begin(), position.top_logprob().end());
    EXPECT_EQ(best.size(), 5u);
    EXPECT_EQ(Ids(top_ids[i]),
              std::vector<int32_t>(position.top_ids().begin(), position.top_ids().end()));
    EXPECT_EQ(Floats(top_logprob[i]), best);
    EXPECT_TRUE(std::is_sorted(best.rbegin(), best.rend()));
  }
  EXPECT_EQ(RunBoth({"score", "--token-ids", "-", "--top", "5", "--json"}, AsJson(kIds)), out)
      << "from standard input";
  // The flag's default is what the format fixes.
  EXPECT_EQ(RunBoth({"score", "--token-ids", WriteIds(kIds), "--json"}), out);
}

TEST_F(Cli, AScoreOfOneTokenHasNoNext) {
  const std::string out = RunBoth({"score", "--token-ids", "-", "--top", "0", "--json"}, "[5]");
  const JsonValue json = ParseLine(out, kScoreMembers);
  EXPECT_EQ(json.Find("next_logprob")->AsArray()->size(), 0u);
  ASSERT_EQ(json.Find("top_ids")->AsArray()->size(), 1u);
  EXPECT_EQ(json.Find("top_ids")->AsArray()->front().AsArray()->size(), 0u);
}

TEST_F(Cli, GenerateHasItsFixedFormat) {
  const std::vector<std::string> command = {"generate", "--max-tokens", "12",    "--temperature",
                                            "0",        "--ignore-eos", "--json"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), command.begin(), command.end());
    return more;
  };
  const std::string out = RunBoth(with({"--token-ids", WriteIds(kIds)}));
  const JsonValue json = ParseLine(out, kGenerateMembers);
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Add(kIds.begin(), kIds.end());
  request.set_max_tokens(12);
  request.set_ignore_eos(true);
  const Result expected = Generate(*one_, request);
  ASSERT_EQ(expected.ids.size(), 12u);
  EXPECT_EQ(Ids(*json.Find("token_ids")), expected.ids);
  EXPECT_EQ(*json.Find("finish_reason")->AsString(), "length");
  const model::Tokenizer& tokenizer = *one_->local()->host().tokenizer;
  EXPECT_EQ(*json.Find("text")->AsString(), tokenizer.Decode(expected.ids, true));
  const JsonValue::Array& digests = *json.Find("row_digests")->AsArray();
  ASSERT_EQ(digests.size(), expected.digests.size());
  for (size_t i = 0; i < digests.size(); ++i) {
    EXPECT_EQ(*digests[i].AsString(), absl::StrFormat("%016x", expected.digests[i])) << i;
  }
  const JsonValue& usage = *json.Find("usage");
  ExpectMembers(usage, {"prompt_tokens", "completion_tokens", "preemptions"});
  EXPECT_EQ(*usage.Find("prompt_tokens")->AsUint(), kIds.size());
  EXPECT_EQ(*usage.Find("completion_tokens")->AsUint(), 12u);
  EXPECT_EQ(*usage.Find("preemptions")->AsUint(), 0u);
  EXPECT_EQ(RunBoth(with({"--token-ids", "-"}), AsJson(kIds)), out) << "from standard input";
}

TEST_F(Cli, APromptASeedAndAStopString) {
  const auto generate = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"generate", "--prompt", "Mr. Holmes looked", "--max-tokens", "24",
                               "--ignore-eos"});
    return RunBoth(more);
  };
  const std::string seven =
      generate({"--temperature", "1", "--top-p", "0.9", "--seed", "7", "--json"});
  EXPECT_EQ(generate({"--temperature", "1", "--top-p", "0.9", "--seed", "7", "--json"}), seven);
  EXPECT_NE(generate({"--temperature", "1", "--top-p", "0.9", "--seed", "8", "--json"}), seven);

  const std::string greedy = generate({"--json"});
  const JsonValue json = ParseLine(greedy, kGenerateMembers);
  const std::string text = *json.Find("text")->AsString();
  ASSERT_GT(text.size(), 20u) << "something to stop at";
  EXPECT_EQ(generate({}), text + "\n") << "without --json it is the text alone";
  const model::Tokenizer& tokenizer = *one_->local()->host().tokenizer;
  const size_t encoded =
      tokenizer.Encode("Mr. Holmes looked", model::Tokenizer::AddedTokens::kIgnore)->size();
  EXPECT_EQ(*json.Find("usage")->Find("prompt_tokens")->AsUint(), encoded + 1) << "the start token";

  const std::string stop = text.substr(text.size() / 2, 4);
  const JsonValue stopped = ParseLine(generate({"--stop", stop, "--json"}), kGenerateMembers);
  EXPECT_EQ(*stopped.Find("finish_reason")->AsString(), "stop");
  const std::vector<int32_t> ids = Ids(*stopped.Find("token_ids"));
  const std::vector<int32_t> all = Ids(*json.Find("token_ids"));
  ASSERT_LT(ids.size(), all.size());
  EXPECT_TRUE(std::equal(ids.begin(), ids.end(), all.begin())) << "the same tokens up to there";
  EXPECT_TRUE(absl::StrContains(*stopped.Find("text")->AsString(), stop));
}

TEST_F(Cli, AModelWithoutATokenizerTakesAndGivesIds) {
  const std::vector<std::string> model = {"--model", kRandomModel, "--max-tokens", "3", "--json"};
  std::vector<std::string> ids = {"generate", "--token-ids", WriteIds({5, 6, 7}), "--ignore-eos"};
  ids.insert(ids.end(), model.begin(), model.end());
  const Finished finished = Run(ids);
  EXPECT_EQ(finished.code, 0) << finished.err;
  const JsonValue json = ParseLine(finished.out, kGenerateMembers);
  EXPECT_EQ(json.Find("token_ids")->AsArray()->size(), 3u);
  EXPECT_EQ(*json.Find("text")->AsString(), "");
  std::vector<std::string> text = {"generate", "--prompt", "Hello"};
  text.insert(text.end(), model.begin(), model.end());
  ExpectFails(text, 1, "text: this model has no tokenizer");
}

TEST_F(Cli, AChatOfTwoLinesRemembersTheFirst) {
  const std::vector<std::string> lines = {"The code of belora is 48213. What is it?",
                                          "What is the code of belora?"};
  v1::GenerateRequest request;
  request.set_max_tokens(20);
  std::string expected;
  for (const std::string& line : lines) {
    v1::ChatMessage* user = request.mutable_chat()->add_messages();
    user->set_role("user");
    user->set_content(line);
    std::string answer;
    ASSERT_TRUE(
        one_->Generate(request, [&](const v1::GenerateEvent& event) { answer += event.text(); })
            .ok());
    v1::ChatMessage* assistant = request.mutable_chat()->add_messages();
    assistant->set_role("assistant");
    assistant->set_content(answer);
    absl::StrAppend(&expected, answer, "\n");
  }
  EXPECT_EQ(RunBoth({"chat", "--temperature", "0", "--max-tokens", "20"},
                    absl::StrJoin(lines, "\n") + "\n"),
            expected);
  EXPECT_EQ(RunBoth({"chat"}, "\nnot read any more\n"), "") << "an empty line leaves";
}

TEST_F(Cli, WhatFailsSaysWhyAndExitsWithOne) {
  const std::string address = (*cluster_)->address();
  for (const std::vector<std::string>& where :
       {std::vector<std::string>{"--model", kTestModel}, {"--address", address}}) {
    const auto fails = [&](std::vector<std::string> arguments, const std::string& says) {
      arguments.insert(arguments.end(), where.begin(), where.end());
      ExpectFails(arguments, 1, says);
    };
    fails({"generate", "--prompt", "x", "--max-tokens", "-1", "--json"}, "max_tokens: -1");
    fails({"generate", "--prompt", "x", "--temperature", "3"}, "temperature: 3");
    fails({"generate"}, "--prompt");
    fails({"score", "--token-ids", "/nonexistent", "--json"}, "/nonexistent");
    fails({"score", "--token-ids", WriteIds({4096}), "--json"}, "token_ids[0]: 4096");
    fails({"generate", "--token-ids", WriteIds({}), "--json"}, "token_ids: is empty");
    fails({"generate", "--prompt", "x", "--ignore-eos", "--max-tokens", "4000", "--deadline-ms",
           "50", "--json"},
          "deadline_ms");
  }
  ExpectFails({"generate", "--prompt", "x"}, 1, "--model");
  ExpectFails({"generate", "--prompt", "x", "--address", "127.0.0.1:1"}, 1, "moebius: ");
}

TEST_F(Cli, WhatIsNoCommandExitsWithTwo) {
  ExpectFails({}, 2, "subcommand");
  ExpectFails({"sing"}, 2, "subcommand");
  ExpectFails({"generate", "--prompt", "x", "--model", kTestModel, "--loud"}, 2, "--loud");
  ExpectFails({"generate", "--prompt", "x", "--model", "/nonexistent"}, 2, "/nonexistent");
  ExpectFails({"generate", "--prompt", "x", "--model", kTestModel, "--max-tokens", "many"}, 2,
              "--max-tokens");
  ExpectFails({"score", "--model", kTestModel}, 2, "--token-ids");
  ExpectFails({"score", "--model", kTestModel, "--token-ids", "-", "--top", "21"}, 2, "--top");
  for (const char* command : {"generate", "chat", "score", "inspect", "convert", "stats", "up"}) {
    const Finished help = Run({command, "--help"});
    EXPECT_EQ(help.code, 0) << command;
    EXPECT_TRUE(absl::StrContains(help.out, "--")) << help.out;
  }
}

TEST_F(Cli, AFlagThatWouldBeIgnoredIsRefused) {
  const std::string address = (*cluster_)->address();
  const auto refused = [&](std::vector<std::string> more, const std::string& says) {
    more.insert(more.begin(), {"generate", "--max-tokens", "1"});
    ExpectFails(more, 2, says);
  };
  refused({"--model", kTestModel, "--prompt", "x", "--token-ids", "-"}, "--prompt");
  for (const char* seed : {"-1", "-18446744073709551615", "18446744073709551616", "1.5"}) {
    refused({"--model", kTestModel, "--prompt", "x", "--seed", seed}, "--seed");
  }
  for (const char* flag : {"--experts", "--threads", "--prefill-chunk"}) {
    refused({"--address", address, "--prompt", "x", flag, "2"}, flag);
  }
  for (const char* flag : {"--tls-cert", "--tls-key", "--tls-ca"}) {
    refused({"--model", kTestModel, "--prompt", "x", flag, "x.pem"}, flag);
  }
  // What looks close to these and is none.
  RunBoth({"generate", "--prompt", "x", "--max-tokens", "1", "--seed", "18446744073709551615"});
  const Finished both = Run({"generate", "--prompt", "x", "--max-tokens", "1", "--model",
                             kTestModel, "--address", address});
  EXPECT_EQ(both.code, 0) << both.err;
}

}  // namespace
}  // namespace moebius::services
