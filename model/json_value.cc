#include "model/json_value.h"

#include <cmath>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "nlohmann/json.hpp"

namespace moebius::model {
namespace {

// Builds a JsonValue from nlohmann's event stream; its parser keeps its own stack on the heap, so
// deep input cannot exhaust ours even before max_depth stops it.
class Builder {
 public:
  using number_integer_t = nlohmann::json::number_integer_t;
  using number_unsigned_t = nlohmann::json::number_unsigned_t;
  using number_float_t = nlohmann::json::number_float_t;
  using string_t = nlohmann::json::string_t;
  using binary_t = nlohmann::json::binary_t;

  explicit Builder(const JsonLimits& limits) : limits_(limits) {}

  bool null() { return Add(JsonValue()); }
  bool boolean(bool value) { return Add(JsonValue(JsonValue::Storage(value))); }
  bool number_integer(number_integer_t value) {
    return Add(JsonValue(JsonValue::Storage(int64_t{value})));
  }
  bool number_unsigned(number_unsigned_t value) {
    return Add(JsonValue(JsonValue::Storage(uint64_t{value})));
  }
  bool number_float(number_float_t value, const string_t&) {
    return Add(JsonValue(JsonValue::Storage(double{value})));
  }
  bool string(string_t& value) { return Add(JsonValue(JsonValue::Storage(std::move(value)))); }
  bool binary(binary_t&) { return Fail("binary value"); }

  bool start_object(size_t) { return Open(JsonValue::OfObject({}), true); }
  bool end_object() { return Close(); }
  bool start_array(size_t) { return Open(JsonValue::OfArray({}), false); }
  bool end_array() { return Close(); }
  bool key(string_t& name) {
    Frame& frame = stack_.back();
    if (!frame.keys.insert(name).second) {
      return Fail(absl::StrCat("duplicate key \"", Shorten(name), "\""));
    }
    frame.key = std::move(name);
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) {
    return Fail(absl::StrCat("byte ", position, ": ", Shorten(error.what())));
  }

  absl::StatusOr<JsonValue> Take(bool parsed) && {
    if (!error_.empty()) return absl::InvalidArgumentError(absl::StrCat("JSON: ", error_));
    if (!parsed || !has_root_) return absl::InvalidArgumentError("JSON: no value");
    return std::move(root_);
  }

 private:
  struct Frame {
    JsonValue value;
    bool is_object = false;
    std::string key;
    absl::flat_hash_set<std::string> keys;
  };

  static std::string Shorten(absl::string_view text) { return std::string(text.substr(0, 200)); }

  bool Fail(std::string message) {
    if (error_.empty()) error_ = std::move(message);
    return false;
  }

  bool CountValue() {
    if (++values_ > limits_.max_values) {
      return Fail(absl::StrCat("more than ", limits_.max_values, " values"));
    }
    return true;
  }

  bool Add(JsonValue value) { return CountValue() && Attach(std::move(value)); }

  bool Attach(JsonValue value) {
    if (stack_.empty()) {
      root_ = std::move(value);
      has_root_ = true;
      return true;
    }
    Frame& frame = stack_.back();
    if (frame.is_object) {
      frame.value.AsObject()->emplace_back(std::move(frame.key), std::move(value));
    } else {
      frame.value.AsArray()->push_back(std::move(value));
    }
    return true;
  }

  bool Open(JsonValue value, bool is_object) {
    if (!CountValue()) return false;
    if (static_cast<int>(stack_.size()) >= limits_.max_depth) {
      return Fail(absl::StrCat("nested deeper than ", limits_.max_depth));
    }
    stack_.push_back(Frame{std::move(value), is_object, {}, {}});
    return true;
  }

  bool Close() {
    JsonValue value = std::move(stack_.back().value);
    stack_.pop_back();
    return Attach(std::move(value));
  }

  JsonLimits limits_;
  std::vector<Frame> stack_;
  JsonValue root_;
  bool has_root_ = false;
  uint64_t values_ = 0;
  std::string error_;
};

nlohmann::ordered_json ToNlohmann(const JsonValue& value) {
  if (const bool* flag = value.AsBool()) return *flag;
  if (const uint64_t* number = value.AsUint()) return *number;
  if (const int64_t* number = value.AsNegativeInt()) return *number;
  if (const double* number = value.AsDouble()) return *number;
  if (const std::string* text = value.AsString()) return *text;
  if (const JsonValue::Array* array = value.AsArray()) {
    nlohmann::ordered_json out = nlohmann::ordered_json::array();
    for (const JsonValue& element : *array) out.push_back(ToNlohmann(element));
    return out;
  }
  if (const JsonValue::Object* object = value.AsObject()) {
    // The keys are unique already; push_back onto the underlying vector would be linear per key
    // through operator[], which matters for an index of 90,000 tensors.
    nlohmann::ordered_json::object_t out;
    for (const auto& [key, member] : *object) {
      static_cast<std::vector<std::pair<const std::string, nlohmann::ordered_json>>&>(out)
          .emplace_back(key, ToNlohmann(member));
    }
    return out;
  }
  return nullptr;
}

}  // namespace

const JsonValue::Array* JsonValue::AsArray() const {
  const auto* array = std::get_if<std::unique_ptr<Array>>(&value_);
  return array == nullptr ? nullptr : array->get();
}
const JsonValue::Object* JsonValue::AsObject() const {
  const auto* object = std::get_if<std::unique_ptr<Object>>(&value_);
  return object == nullptr ? nullptr : object->get();
}
JsonValue::Array* JsonValue::AsArray() {
  auto* array = std::get_if<std::unique_ptr<Array>>(&value_);
  return array == nullptr ? nullptr : array->get();
}
JsonValue::Object* JsonValue::AsObject() {
  auto* object = std::get_if<std::unique_ptr<Object>>(&value_);
  return object == nullptr ? nullptr : object->get();
}

bool JsonValue::GetNumber(double* out) const {
  if (const uint64_t* number = AsUint()) {
    *out = static_cast<double>(*number);
  } else if (const int64_t* negative = AsNegativeInt()) {
    *out = static_cast<double>(*negative);
  } else if (const double* real = AsDouble()) {
    *out = *real;
  } else {
    return false;
  }
  return true;
}

const JsonValue* JsonValue::Find(absl::string_view key) const {
  const Object* object = AsObject();
  if (object == nullptr) return nullptr;
  for (const Member& member : *object) {
    if (member.first == key) return &member.second;
  }
  return nullptr;
}

const char* JsonValue::KindName() const {
  static constexpr const char* kNames[] = {"null",     "a boolean", "an integer", "an integer",
                                           "a number", "a string",  "an array",   "an object"};
  return kNames[value_.index()];
}

absl::StatusOr<JsonValue> ParseJson(absl::string_view text, const JsonLimits& limits) {
  // nlohmann's lexer takes a NUL for the end of input, so what follows one would go unseen; and it
  // skips a byte order mark. Neither is JSON.
  if (const size_t nul = text.find('\0'); nul != absl::string_view::npos) {
    return absl::InvalidArgumentError(absl::StrCat("JSON: byte ", nul, ": NUL byte"));
  }
  if (!text.empty() && text[0] == '\xEF') {
    return absl::InvalidArgumentError("JSON: byte 0: byte order mark");
  }
  Builder builder(limits);
  const bool parsed = nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return std::move(builder).Take(parsed);
}

std::string WriteJson(const JsonValue& value, int indent) {
  // error_handler replace: strings of ours come from ParseJson or from code, so they are UTF-8; a
  // stray byte must not become an exception.
  return ToNlohmann(value).dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace moebius::model
