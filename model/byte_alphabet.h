#pragma once

// The byte alphabet of byte-level BPE (Radford et al. 2019): every byte is written as one printable
// code point, so that a vocabulary of arbitrary byte strings is a set of readable strings. Bytes
// 33-126, 161-172 and 174-255 stand for themselves; the other 68, in increasing order, are U+0100,
// U+0101, ... (a space is U+0120, a newline U+010A). Pure functions.

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace moebius::model {

// UTF-8 of the code point that stands for `byte`.
std::string ByteSymbol(uint8_t byte);

// The bytes that a string over the alphabet stands for; nullopt if it holds anything else.
std::optional<std::string> BytesOfSymbols(absl::string_view symbols);

}  // namespace moebius::model
