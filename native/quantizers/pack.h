// Codes of 1 to 8 bits as dense little-endian bit streams; src/spicerack/numerics/bits.py is the specification.
#pragma once

#include <cstdint>

namespace spicerack {

// codes [rows, columns], one byte each, -> words [rows, ceil(columns * bits / 32)] of four bytes, filled up with zeros.
// Of every code + offset the low bits are kept.
void pack(const uint8_t* codes, int64_t rows, int64_t columns, int bits, int offset, uint8_t* words);

// Its inverse: codes get back minus `offset`, modulo 256.
void unpack(const uint8_t* words, int64_t rows, int64_t columns, int bits, int offset, uint8_t* codes);

}  // namespace spicerack
