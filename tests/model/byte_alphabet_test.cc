// Goal: the alphabet is the published one and a bijection on bytes.

#include "model/byte_alphabet.h"

#include <set>

#include "gtest/gtest.h"

namespace moebius::model {
namespace {

TEST(ByteAlphabet, EveryByteHasItsOwnSymbolAndComesBack) {
  std::set<std::string> symbols;
  for (int byte = 0; byte < 256; ++byte) {
    const std::string symbol = ByteSymbol(static_cast<uint8_t>(byte));
    symbols.insert(symbol);
    EXPECT_EQ(BytesOfSymbols(symbol), std::string(1, static_cast<char>(byte)));
  }
  EXPECT_EQ(symbols.size(), 256u);
  EXPECT_EQ(ByteSymbol(' '), "\u0120");
  EXPECT_EQ(ByteSymbol('\n'), "\u010A");
  EXPECT_EQ(ByteSymbol(0), "\u0100");
  EXPECT_EQ(ByteSymbol(127), "\u0121");
  EXPECT_EQ(ByteSymbol(173), "\u0143");
  EXPECT_EQ(ByteSymbol('A'), "A");
  EXPECT_EQ(ByteSymbol(0xE9), "\u00E9");
}

TEST(ByteAlphabet, StringsOutsideTheAlphabetAreNoBytes) {
  EXPECT_EQ(BytesOfSymbols("\u0120the"), " the");
  EXPECT_EQ(BytesOfSymbols(""), "");
  for (const char* text :
       {" ", "a b", "\n", "\u00A0", "\u0144", "\uFF5C", "\xC4", "\xC4x", "\xFF"}) {
    EXPECT_EQ(BytesOfSymbols(text), std::nullopt) << text;
  }
}

}  // namespace
}  // namespace moebius::model
