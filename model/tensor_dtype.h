#pragma once

// Element types that a safetensors file may declare. The format's list is closed: an unknown name
// is an error, never a skipped check. Only three of them are served (base/dtype.h).

#include <cstdint>
#include <optional>

#include "absl/strings/string_view.h"
#include "base/dtype.h"

namespace moebius::model {

enum class TensorDType : uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E5m2,
  kF8E4m3,
  kF8E8m0,
  kF8E4m3Fnuz,
  kF8E5m2Fnuz,
  kI16,
  kU16,
  kF16,
  kBf16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
  kF4,
  kF6E2m3,
  kF6E3m2,
};

// The name in the file ("BF16", "F8_E4M3", ...).
const char* Name(TensorDType dtype);
int BitsOf(TensorDType dtype);
std::optional<TensorDType> TensorDTypeFromName(absl::string_view name);

TensorDType ToTensorDType(DType dtype);
// nullopt for element types that Moebius does not compute with.
std::optional<DType> ToDType(TensorDType dtype);

}  // namespace moebius::model
