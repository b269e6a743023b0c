#pragma once

// Element types of tensors in checkpoints and on the wire.

#include <cstdint>

namespace moebius {

enum class DType : uint8_t { kF32 = 0, kBf16 = 1, kE4m3 = 2 };

constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBf16:
      return 2;
    case DType::kE4m3:
      return 1;
  }
  return 0;
}

constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBf16:
      return "BF16";
    case DType::kE4m3:
      return "F8_E4M3";
  }
  return "?";
}

}  // namespace moebius
