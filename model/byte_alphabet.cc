#include "model/byte_alphabet.h"

#include <array>

namespace moebius::model {
namespace {

constexpr int kCodePoints = 256 + 68;

struct Tables {
  std::array<uint16_t, 256> code_point{};
  std::array<int16_t, kCodePoints> byte{};  // -1: not in the alphabet
};

constexpr bool StandsForItself(int byte) {
  return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

constexpr Tables MakeTables() {
  Tables tables;
  tables.byte.fill(-1);
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const int code_point = StandsForItself(byte) ? byte : next++;
    tables.code_point[byte] = static_cast<uint16_t>(code_point);
    tables.byte[code_point] = static_cast<int16_t>(byte);
  }
  return tables;
}

constexpr Tables kTables = MakeTables();
static_assert(kTables.code_point[' '] == 0x120);
static_assert(kTables.code_point['\n'] == 0x10A);
static_assert(kTables.byte[kCodePoints - 1] == 173);

}  // namespace

std::string ByteSymbol(uint8_t byte) {
  const uint16_t code_point = kTables.code_point[byte];
  if (code_point < 0x80) return std::string(1, static_cast<char>(code_point));
  return {static_cast<char>(0xC0 | code_point >> 6), static_cast<char>(0x80 | (code_point & 0x3F))};
}

std::optional<std::string> BytesOfSymbols(absl::string_view symbols) {
  std::string bytes;
  for (size_t i = 0; i < symbols.size(); ++i) {
    int code_point = static_cast<unsigned char>(symbols[i]);
    if (code_point >= 0x80) {
      // All code points of the alphabet are below U+0800: at most two bytes.
      if ((code_point & 0xE0) != 0xC0 || i + 1 >= symbols.size()) return std::nullopt;
      const int continuation = static_cast<unsigned char>(symbols[++i]);
      if ((continuation & 0xC0) != 0x80) return std::nullopt;
      code_point = (code_point & 0x1F) << 6 | (continuation & 0x3F);
    }
    if (code_point >= kCodePoints || kTables.byte[code_point] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(kTables.byte[code_point]));
  }
  return bytes;
}

}  // namespace moebius::model
