#include "model/tensor_dtype.h"

namespace moebius::model {
namespace {

struct Entry {
  TensorDType dtype;
  const char* name;
  int bits;
};

constexpr Entry kEntries[] = {
    {TensorDType::kBool, "BOOL", 8},
    {TensorDType::kU8, "U8", 8},
    {TensorDType::kI8, "I8", 8},
    {TensorDType::kF8E5m2, "F8_E5M2", 8},
    {TensorDType::kF8E4m3, "F8_E4M3", 8},
    {TensorDType::kF8E8m0, "F8_E8M0", 8},
    {TensorDType::kF8E4m3Fnuz, "F8_E4M3FNUZ", 8},
    {TensorDType::kF8E5m2Fnuz, "F8_E5M2FNUZ", 8},
    {TensorDType::kI16, "I16", 16},
    {TensorDType::kU16, "U16", 16},
    {TensorDType::kF16, "F16", 16},
    {TensorDType::kBf16, "BF16", 16},
    {TensorDType::kI32, "I32", 32},
    {TensorDType::kU32, "U32", 32},
    {TensorDType::kF32, "F32", 32},
    {TensorDType::kC64, "C64", 64},
    {TensorDType::kF64, "F64", 64},
    {TensorDType::kI64, "I64", 64},
    {TensorDType::kU64, "U64", 64},
    {TensorDType::kF4, "F4", 4},
    {TensorDType::kF6E2m3, "F6_E2M3", 6},
    {TensorDType::kF6E3m2, "F6_E3M2", 6},
};

}  // namespace

const char* Name(TensorDType dtype) { return kEntries[static_cast<size_t>(dtype)].name; }

int BitsOf(TensorDType dtype) { return kEntries[static_cast<size_t>(dtype)].bits; }

std::optional<TensorDType> TensorDTypeFromName(absl::string_view name) {
  for (const Entry& entry : kEntries) {
    if (name == entry.name) return entry.dtype;
  }
  return std::nullopt;
}

TensorDType ToTensorDType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return TensorDType::kF32;
    case DType::kBf16:
      return TensorDType::kBf16;
    case DType::kE4m3:
      return TensorDType::kF8E4m3;
  }
  return TensorDType::kF32;
}

std::optional<DType> ToDType(TensorDType dtype) {
  switch (dtype) {
    case TensorDType::kF32:
      return DType::kF32;
    case TensorDType::kBf16:
      return DType::kBf16;
    case TensorDType::kF8E4m3:
      return DType::kE4m3;
    default:
      return std::nullopt;
  }
}

}  // namespace moebius::model
