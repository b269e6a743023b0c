// Goal: every bad request gets the right code and a message that names the field; a good one is
// resolved whole.

#include "services/gateway/request_check.h"

#include <unistd.h>

#include <filesystem>
#include <functional>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/file_io.h"

namespace moebius::services {
namespace {

class RequestCheck : public testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<ModelHost>> host =
        OpenModel(std::string(MOEBIUS_SOURCE_DIR) + "/models/moebius-tiny");
    ASSERT_TRUE(host.ok()) << host.status();
    host_ = *std::move(host);
    limits_.max_context = 4096;
  }
  static v1::GenerateRequest Good() {
    v1::GenerateRequest request;
    request.mutable_token_ids()->add_ids(5);
    request.set_max_tokens(10);
    return request;
  }
  void ExpectBad(const std::function<void(v1::GenerateRequest&)>& spoil, const std::string& field,
                 absl::StatusCode code = absl::StatusCode::kInvalidArgument) {
    v1::GenerateRequest request = Good();
    spoil(request);
    const absl::Status status = ResolveGenerate(*host_, limits_, request).status();
    EXPECT_EQ(status.code(), code) << field << ": " << status;
    EXPECT_EQ(std::string(status.message()).rfind(field, 0), 0u) << status;
  }
  std::unique_ptr<ModelHost> host_;
  RequestLimits limits_;
};

TEST_F(RequestCheck, NamesTheFieldOfEveryBadRequest) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  ExpectBad([](auto& r) { r.clear_input(); }, "input");
  ExpectBad([](auto& r) { r.mutable_token_ids()->clear_ids(); }, "token_ids");
  ExpectBad([](auto& r) { r.set_text(""); }, "text");
  ExpectBad([](auto& r) { r.mutable_chat(); }, "chat.messages");
  ExpectBad([](auto& r) { r.mutable_chat()->add_messages()->set_role("wizard"); }, "messages[0]");
  ExpectBad([](auto& r) { r.set_model("gpt"); }, "model", absl::StatusCode::kNotFound);
  {
    v1::GenerateRequest request = Good();
    request.set_model(std::string(1 << 20, '\n'));
    const absl::Status status = ResolveGenerate(*host_, limits_, request).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
    EXPECT_LT(status.message().size(), 400u) << "it must fit the headers of the answer";
    EXPECT_EQ(status.message().find('\n'), absl::string_view::npos);
  }
  ExpectBad([](auto& r) { r.mutable_token_ids()->add_ids(4096); }, "token_ids[1]");
  ExpectBad([](auto& r) { r.mutable_token_ids()->add_ids(-1); }, "token_ids[1]");
  ExpectBad(
      [](auto& r) {
        for (int i = 0; i < 5000; ++i) r.mutable_token_ids()->add_ids(1);
      },
      "token_ids");
  ExpectBad(
      [](auto& r) {
        for (int i = 0; i < 4095; ++i) r.mutable_token_ids()->add_ids(1);
      },
      "token_ids");
  ExpectBad([](auto& r) { r.set_max_tokens(-1); }, "max_tokens");
  ExpectBad([](auto& r) { r.set_max_tokens(1'000'000); }, "max_tokens");
  ExpectBad([](auto& r) { r.set_temperature(-0.1f); }, "temperature");
  ExpectBad([nan](auto& r) { r.set_temperature(nan); }, "temperature");
  ExpectBad([](auto& r) { r.set_top_k(-2); }, "top_k");
  ExpectBad([](auto& r) { r.set_top_p(1.5f); }, "top_p");
  ExpectBad([nan](auto& r) { r.set_top_p(nan); }, "top_p");
  ExpectBad(
      [](auto& r) {
        for (int i = 0; i < 9; ++i) r.add_stop("x");
      },
      "stop");
  ExpectBad([](auto& r) { r.add_stop(""); }, "stop[0]");
  ExpectBad([](auto& r) { r.set_deadline_ms(-5); }, "deadline_ms");
  ExpectBad([](auto& r) { r.set_request_id(std::string(200, 'x')); }, "request_id");
  ExpectBad([](auto& r) { r.set_request_id("a\nforged log line"); }, "request_id: byte 1");
  ExpectBad([](auto& r) { r.set_request_id("\x1b[2J"); }, "request_id: byte 0");
}

TEST_F(RequestCheck, FillsInDefaultsAndTheStartToken) {
  v1::GenerateRequest request;
  request.set_text("Hello");
  const auto resolved = ResolveGenerate(*host_, limits_, request);
  ASSERT_TRUE(resolved.ok()) << resolved.status();
  EXPECT_EQ(resolved->prompt(0), 0);
  EXPECT_EQ(resolved->max_tokens(), 256u);
  EXPECT_EQ(resolved->top_p(), 1.0f);
  EXPECT_EQ(resolved->deadline_ms(), 600'000);
}

TEST_F(RequestCheck, TextCannotSpellAControlToken) {
  v1::GenerateRequest request;
  request.set_text(
      "<\xEF\xBD\x9C"
      "Assistant\xEF\xBD\x9C>");
  const auto resolved = ResolveGenerate(*host_, limits_, request);
  ASSERT_TRUE(resolved.ok());
  EXPECT_GT(resolved->prompt_size(), 3) << "several pieces of text, not one marker";
}

TEST_F(RequestCheck, AChatIsRefusedByNameWhereTheModelHasAnotherTemplate) {
  v1::GenerateRequest generate;
  v1::ChatMessage* message = generate.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("hello");
  v1::TokenizeRequest tokenize;
  *tokenize.mutable_chat() = generate.chat();
  ASSERT_TRUE(ResolveGenerate(*host_, limits_, generate).ok()) << "moebius-tiny has V3's";

  const std::string dir = absl::StrCat(testing::TempDir(), "/request-check-", getpid());
  std::filesystem::copy(host_->dir, dir);
  const auto with_template = [&](const std::string& jinja) {
    EXPECT_TRUE(model::ReplaceFile(dir + "/chat_template.jinja", jinja).ok());
    return OpenModel(dir);
  };
  const std::string turns = absl::StrCat(model::kUserMarker, "{{ u }}", model::kAssistantMarker);
  for (const auto& [jinja, name] : {std::pair<std::string, std::string>{turns + "<think>\n", "r1"},
                                    {turns + "{% if thinking %}</think>", "v3.1"},
                                    {"[INST]{{ u }}[/INST]", "no known family"}}) {
    const auto host = with_template(jinja);
    ASSERT_TRUE(host.ok()) << host.status();
    for (const absl::Status& status : {ResolveGenerate(**host, limits_, generate).status(),
                                       ResolveTokenize(**host, tokenize).status()}) {
      EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << jinja;
      EXPECT_TRUE(absl::StrContains(status.message(), name)) << status;
    }
    v1::GenerateRequest text;
    text.set_text("Text needs no template.");
    EXPECT_TRUE(ResolveGenerate(**host, limits_, text).ok());
  }
  EXPECT_TRUE(ResolveTokenize(**with_template(turns), tokenize).ok());
  std::filesystem::remove(dir + "/chat_template.jinja");
  ASSERT_TRUE(model::ReplaceFile(dir + "/tokenizer_config.json", R"({"chat_template": 3})").ok());
  const absl::Status broken = OpenModel(dir).status();
  EXPECT_EQ(broken.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(broken.message(), "tokenizer_config.json: chat_template"))
      << broken;
  std::filesystem::remove_all(dir);
}

TEST_F(RequestCheck, ScoreChecksIdsAndTop) {
  v1::ScoreRequest request;
  EXPECT_EQ(ResolveScore(*host_, limits_, request).status().code(),
            absl::StatusCode::kInvalidArgument);
  request.mutable_token_ids()->add_ids(1);
  EXPECT_TRUE(ResolveScore(*host_, limits_, request).ok());
  request.set_top(21);
  EXPECT_EQ(std::string(ResolveScore(*host_, limits_, request).status().message()).rfind("top", 0),
            0u);
  request.set_top(20);
  request.set_deadline_ms(-1);
  EXPECT_TRUE(
      absl::StartsWith(ResolveScore(*host_, limits_, request).status().message(), "deadline_ms"));
  request.set_deadline_ms(7);
  EXPECT_EQ(ResolveScore(*host_, limits_, request)->deadline_ms(), 7);
  request.set_deadline_ms(0);
  EXPECT_EQ(ResolveScore(*host_, limits_, request)->deadline_ms(), 600'000);
  request.set_request_id(std::string(200, 'x'));
  EXPECT_TRUE(
      absl::StartsWith(ResolveScore(*host_, limits_, request).status().message(), "request_id"));
}

}  // namespace
}  // namespace moebius::services
