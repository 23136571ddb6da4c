// Codes in the blocks of a file: runs of `stride` codes share bytes, the bits of the first run lowest.
// src/spicerack/storage/gguf/layouts.py has the table of them, and in torch what each means.
#pragma once

#include <cstdint>

namespace spicerack {

// Bits shift..shift+bits-1 of every code of a block, from byte `offset` of the block on. bits: 1, 2, 4 or 8; stride: 1,
// or a multiple of 8.
struct Plane {
    int bits, stride, shift;
    int64_t offset;
};

// How the codes of a block lie. count: codes, at most MAX_CODES and a multiple of 32. nbytes: of the block, scales and
// all. The planes hold all bits of a code.
struct Planes {
    static constexpr int64_t MAX_CODES = 256;
    int64_t count, nbytes;
    const Plane* planes;
    int planes_count;
};

// Codes of `bits` in streams (pack.h), words [rows, columns * bits / 32] -> their bits in blocks, raw
// [rows, columns / count * nbytes]; what lies between is left alone.
void to_blocks(const uint8_t* words, int64_t rows, int64_t columns, int bits, const Planes& planes, uint8_t* raw);

// Its inverse; of every code the low bits are kept.
void from_blocks(const uint8_t* raw, int64_t rows, int64_t columns, int bits, const Planes& planes, uint8_t* words);

}  // namespace spicerack
