#pragma once

// JSON as a checkpoint directory needs it: strict, bounded, and without exceptions. Everything
// under model/ that reads JSON from outside (config.json, safetensors headers, indexes, manifests,
// tokenizer.json) goes through ParseJson, so that these rules hold everywhere:
//
//   - a duplicate key in an object is an error (most libraries keep the last one silently, so two
//     readers of one file can see two different models);
//   - nesting depth and the number of values are bounded before they cost anything;
//   - an integer literal stays an integer: 1.0, 1e3 and -1 are never mistaken for a size;
//   - the text is valid UTF-8 and nothing but white space follows the value.
//
// Values are plain data, movable, not copyable. Reading one from several threads is safe.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace moebius::model {

class JsonValue {
 public:
  using Array = std::vector<JsonValue>;
  using Member = std::pair<std::string, JsonValue>;
  using Object = std::vector<Member>;  // in the order of the file; keys are unique
  // Unsigned literals are uint64_t; literals with a minus sign int64_t; all others double.
  using Storage = std::variant<std::nullptr_t, bool, uint64_t, int64_t, double, std::string,
                               std::unique_ptr<Array>, std::unique_ptr<Object>>;

  JsonValue() = default;
  explicit JsonValue(Storage value) : value_(std::move(value)) {}
  static JsonValue OfArray(Array array) {
    return JsonValue(Storage(std::make_unique<Array>(std::move(array))));
  }
  static JsonValue OfObject(Object object) {
    return JsonValue(Storage(std::make_unique<Object>(std::move(object))));
  }
  static JsonValue OfString(absl::string_view text) {
    return JsonValue(Storage(std::string(text)));
  }
  static JsonValue OfUint(uint64_t number) { return JsonValue(Storage(number)); }

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  // Each returns nullptr when the value is of another kind.
  const bool* AsBool() const { return std::get_if<bool>(&value_); }
  const uint64_t* AsUint() const { return std::get_if<uint64_t>(&value_); }
  const int64_t* AsNegativeInt() const { return std::get_if<int64_t>(&value_); }
  const double* AsDouble() const { return std::get_if<double>(&value_); }
  const std::string* AsString() const { return std::get_if<std::string>(&value_); }
  const Array* AsArray() const;
  const Object* AsObject() const;
  Array* AsArray();
  Object* AsObject();

  // Any of the three number kinds as a double. False when the value is not a number.
  bool GetNumber(double* out) const;

  // The member of an object, or nullptr (also when this is no object). Linear in the object's size:
  // meant for objects with a handful of fields; iterate over large ones.
  const JsonValue* Find(absl::string_view key) const;

  // "null", "a boolean", "an integer", "a number", "a string", "an array", "an object".
  const char* KindName() const;

 private:
  Storage value_ = nullptr;
};

struct JsonLimits {
  int max_depth = 16;               // nesting of arrays and objects
  uint64_t max_values = 1'000'000;  // values of every kind together
};

// Errors: INVALID_ARGUMENT with the byte position and the rule that was broken.
absl::StatusOr<JsonValue> ParseJson(absl::string_view text, const JsonLimits& limits = {});

// The value as text; `indent` < 0 gives the compact form.
std::string WriteJson(const JsonValue& value, int indent);

}  // namespace moebius::model
