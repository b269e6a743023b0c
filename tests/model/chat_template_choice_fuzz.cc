// Feeds arbitrary tokenizer_config.json texts. Whatever is accepted has a name.

#include <cstdint>
#include <string>

#include "base/check.h"
#include "model/chat_template_choice.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moebius::model;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto choice = ParseChatTemplateChoice(text);
  if (choice.ok()) CHECK(std::string(Name(*choice)) != "?");
  return 0;
}
