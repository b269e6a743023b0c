// Goal: a model directory's template is told apart from its neighbours', wherever the directory
// keeps it. Method: texts with the marks of the published templates, in each place and form.

#include "model/chat_template_choice.h"

#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/file_io.h"
#include "model/json_value.h"
#include "tests/model/test_dir.h"

namespace moebius::model {
namespace {

std::string V3() {
  return absl::StrCat("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '",
                      kUserMarker, "' + m['content'] }}{% else %}{{ '", kAssistantMarker,
                      "' + m['content'] + '", kEosMarker, "' }}{% endif %}{% endfor %}");
}
std::string R1() {
  return absl::StrCat(V3(), "{% set content = content.split('</think>')[-1] %}{{ '",
                      kAssistantMarker, "' }}");
}
std::string R1ThatOpens() { return absl::StrCat(V3(), "{{ '", kAssistantMarker, "<think>\\n' }}"); }
std::string V31() {
  return absl::StrCat("{% if not thinking is defined %}{% set thinking = false %}{% endif %}", R1(),
                      "{% if not thinking %}{{ '</think>' }}{% endif %}");
}

TEST(ChatTemplateChoice, EachPublishedTemplateIsKnownByItsMarks) {
  EXPECT_EQ(IdentifyChatTemplate(V3()), ChatTemplate::kV3);
  EXPECT_EQ(IdentifyChatTemplate(R1()), ChatTemplate::kR1);
  EXPECT_EQ(IdentifyChatTemplate(R1ThatOpens()), ChatTemplate::kR1);
  EXPECT_EQ(IdentifyChatTemplate(V31()), ChatTemplate::kV31);
}

TEST(ChatTemplateChoice, WhatIsNoneOfThemIsNotTakenForOne) {
  for (const std::string& jinja :
       {std::string(), std::string("{{ 'User: ' + m['content'] + '\\n\\n' }}"),
        std::string("<|im_user|>user<|im_middle|>{{ m['content'] }}<|im_end|>"),
        absl::StrCat(kUserMarker, "{{ m['content'] }}"),
        absl::StrCat(V3(), "{% if enable_thinking %}{{ 'Think!' }}{% endif %}")}) {
    EXPECT_EQ(IdentifyChatTemplate(jinja), ChatTemplate::kOther) << jinja;
  }
}

std::string Config(JsonValue value) {
  JsonValue::Object object;
  object.emplace_back("add_bos_token", JsonValue(JsonValue::Storage(true)));
  object.emplace_back("chat_template", std::move(value));
  return WriteJson(JsonValue::OfObject(std::move(object)), 1);
}
JsonValue Named(const std::string& name, const std::string& jinja) {
  JsonValue::Object object;
  object.emplace_back("name", JsonValue::OfString(name));
  object.emplace_back("template", JsonValue::OfString(jinja));
  return JsonValue::OfObject(std::move(object));
}

TEST(ChatTemplateChoice, TokenizerConfigNamesOneTemplateOrAListOfThem) {
  EXPECT_EQ(*ParseChatTemplateChoice(Config(JsonValue::OfString(R1()))), ChatTemplate::kR1);
  EXPECT_EQ(*ParseChatTemplateChoice(Config(JsonValue())), ChatTemplate::kV3);
  EXPECT_EQ(*ParseChatTemplateChoice("{}"), ChatTemplate::kV3);
  JsonValue::Array list;
  list.push_back(Named("tool_use", V3()));
  list.push_back(Named("default", V31()));
  EXPECT_EQ(*ParseChatTemplateChoice(Config(JsonValue::OfArray(std::move(list)))),
            ChatTemplate::kV31);
}

TEST(ChatTemplateChoice, AnUnusableFieldIsNamed) {
  JsonValue::Array no_default;
  no_default.push_back(Named("tool_use", V3()));
  JsonValue::Array no_name;
  no_name.push_back(JsonValue::OfString(V3()));
  for (const std::string& config :
       {Config(JsonValue::OfUint(3)), Config(JsonValue::OfArray(std::move(no_default))),
        Config(JsonValue::OfArray(std::move(no_name)))}) {
    const absl::Status status = ParseChatTemplateChoice(config).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << config;
    EXPECT_TRUE(absl::StrContains(status.message(), "chat_template")) << status;
  }
  for (const char* text : {"", "[]", "{\"chat_template\":", "{\"a\":1,\"a\":1}"}) {
    EXPECT_EQ(ParseChatTemplateChoice(text).status().code(), absl::StatusCode::kInvalidArgument)
        << text;
  }
}

TEST(ChatTemplateChoice, TheDirectoryDecides) {
  const std::string dir = TestDir() + "/chat";
  std::filesystem::create_directories(dir);
  EXPECT_EQ(*LoadChatTemplate(dir), ChatTemplate::kV3) << "no file at all";
  ASSERT_TRUE(ReplaceFile(dir + "/tokenizer_config.json", Config(JsonValue::OfString(R1()))).ok());
  EXPECT_EQ(*LoadChatTemplate(dir), ChatTemplate::kR1);
  ASSERT_TRUE(ReplaceFile(dir + "/chat_template.jinja", V31()).ok());
  EXPECT_EQ(*LoadChatTemplate(dir), ChatTemplate::kV31) << "a template file of its own overrides";
  std::filesystem::remove(dir + "/chat_template.jinja");
  ASSERT_TRUE(ReplaceFile(dir + "/tokenizer_config.json", "{").ok());
  const absl::Status broken = LoadChatTemplate(dir).status();
  EXPECT_EQ(broken.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(broken.message(), dir + "/tokenizer_config.json")) << broken;
}

TEST(ChatTemplateChoice, TheTrainedModelHasTheTemplateThatIsServed) {
  EXPECT_EQ(*LoadChatTemplate(MOEBIUS_SOURCE_DIR "/models/moebius-tiny"), ChatTemplate::kV3);
}

}  // namespace
}  // namespace moebius::model
