#include "model/utf8.h"

#include "base/check.h"

namespace moebius::model {
namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";  // U+FFFD

}  // namespace

Utf8Step NextUtf8(absl::string_view text) {
  CHECK(!text.empty());
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Utf8Step::Kind::kValid, 1};
  // Well-formed sequences (Unicode table 3-7): the second byte's range depends on the lead.
  size_t length = 0;
  unsigned char low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;  // no surrogates
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;  // up to U+10FFFF
  } else {
    return {Utf8Step::Kind::kInvalid, 1};
  }
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Utf8Step::Kind::kIncomplete, i};
    if (byte(i) < low || byte(i) > high) return {Utf8Step::Kind::kInvalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8Step::Kind::kValid, length};
}

size_t ValidUtf8Prefix(absl::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Step step = NextUtf8(text.substr(at));
    if (step.kind != Utf8Step::Kind::kValid) break;
    at += step.length;
  }
  return at;
}

size_t InvalidUtf8Prefix(absl::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Step step = NextUtf8(text.substr(at));
    if (step.kind == Utf8Step::Kind::kValid) break;
    at += step.length;
  }
  return at;
}

std::string Utf8Stream::Append(absl::string_view bytes) {
  const std::string joined = pending_ + std::string(bytes);
  pending_.clear();
  std::string out;
  absl::string_view rest = joined;
  while (!rest.empty()) {
    const Utf8Step step = NextUtf8(rest);
    switch (step.kind) {
      case Utf8Step::Kind::kValid:
        out.append(rest.data(), step.length);
        break;
      case Utf8Step::Kind::kInvalid:
        out.append(kReplacement);
        break;
      case Utf8Step::Kind::kIncomplete:
        pending_ = std::string(rest);
        return out;
    }
    rest.remove_prefix(step.length);
  }
  return out;
}

std::string Utf8Stream::Finish() {
  const bool incomplete = pending();
  pending_.clear();
  return incomplete ? kReplacement : "";
}

}  // namespace moebius::model
