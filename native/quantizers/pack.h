// Codes of 1 to 8 bits as dense little-endian bit streams; src/spicerack/bits.py is the specification.
#pragma once

#include <cstdint>

namespace spicerack {

// codes [rows, columns] -> words [rows, 4 * ceil(columns * bits / 32) bytes]. Of every code + offset the low bits are kept.
void pack(const uint8_t* codes, int64_t rows, int64_t columns, int bits, int offset, uint8_t* words);

// Its inverse: codes get back minus `offset`, modulo 256.
void unpack(const uint8_t* words, int64_t rows, int64_t columns, int bits, int offset, uint8_t* codes);

}  // namespace spicerack
